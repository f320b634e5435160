// Registers, uploads, lists, downloads, deletes and lists again; prints what came back.
// Arguments: address of the service, its registration key, a WAV as a data URL.
import createClient from "openapi-fetch";
import type { paths } from "./api.js";

declare const process: { argv: string[] };
const [baseUrl, key, wav] = process.argv.slice(2);
const bearer = (token: string) => ({ headers: { Authorization: `Bearer ${token}` } });

function given<T>(answer: { data?: T; error?: { detail: string }; response: Response }): T {
  if (answer.data === undefined) throw new Error(answer.error?.detail ?? answer.response.statusText);
  return answer.data;
}

const visitor = createClient<paths>({ baseUrl });
const registration = { body: { username: "TypeScript" } };
const refusal = (await visitor.POST("/api/registration/", registration)).error;
const { id_user, user_token } = given(
  await visitor.POST("/api/registration/", { ...registration, ...bearer(key) }),
);

const owner = createClient<paths>({ baseUrl, ...bearer(user_token) });
const file = await (await fetch(wav)).blob();
const link = given(
  await owner.POST("/api/upload_audiorecord/", {
    body: { id_user, quality: 6, file_wav: "" },
    bodySerializer(fields) {
      const form = new FormData();
      for (const [name, value] of Object.entries({ ...fields, file_wav: file })) {
        if (value instanceof Blob) form.append(name, value, "speech.wav");
        else form.append(name, String(value));
      }
      return form;
    },
  }),
)["URL for download"];

const list = async () =>
  given(await owner.GET("/api/records", { params: { query: { id_user } } })).records;
const records = await list();
const query = { id_record: records[0].id_record, id_user };
const mp3 = given(
  await visitor.GET("/api/download", { params: { query }, parseAs: "arrayBuffer" }),
);
const { response } = await owner.DELETE("/api/download", { params: { query } });
const bytes = Array.from(new Uint8Array(mp3));
console.log(
  JSON.stringify({ refusal, link, records, bytes, deleted: response.status, left: await list() }),
);
