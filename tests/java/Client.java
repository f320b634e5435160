import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublisher;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse;
import java.net.http.HttpResponse.BodyHandlers;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import java.util.UUID;

/**
 * Registers, uploads with a declared length and chunked, downloads, deletes and downloads again;
 * prints each status. Every request offers an upgrade to HTTP/2, as is the default of HttpClient.
 */
class Client {
    static final HttpClient CLIENT = HttpClient.newHttpClient();

    static HttpResponse<String> send(HttpRequest.Builder request) throws Exception {
        HttpResponse<String> response = CLIENT.send(request.build(), BodyHandlers.ofString());
        System.out.println(response.statusCode());
        return response;
    }

    static String between(String text, String before, String after) {
        int start = text.indexOf(before) + before.length();
        return text.substring(start, text.indexOf(after, start));
    }

    static HttpRequest.Builder request(String url) {
        return HttpRequest.newBuilder(URI.create(url));
    }

    static BodyPublisher form(String id, String token, byte[] wav, boolean chunked) {
        String part = "--frontier\r\nContent-Disposition: form-data; name=";
        List<byte[]> parts = List.of(
            (part + "\"user_token\"\r\n\r\n" + token + "\r\n").getBytes(),
            (part + "\"id_user\"\r\n\r\n" + id + "\r\n").getBytes(),
            (part + "\"file_wav\"; filename=\"speech.wav\"\r\n\r\n").getBytes(),
            wav,
            "\r\n--frontier--\r\n".getBytes());
        BodyPublisher body = BodyPublishers.ofByteArrays(parts);
        long length = parts.stream().mapToLong(each -> each.length).sum();
        return chunked ? body : BodyPublishers.fromPublisher(body, length);
    }

    public static void main(String[] arguments) throws Exception {
        String base = arguments[0];
        byte[] wav = Files.readAllBytes(Path.of(arguments[1]));
        String username = "{\"username\": \"" + UUID.randomUUID() + "\"}";
        String user = send(request(base + "/api/registration/")
            .POST(BodyPublishers.ofString(username))).body();
        String id = between(user, "\"id_user\":", ",");
        String token = between(user, "\"user_token\":\"", "\"");
        String link = "";
        for (boolean chunked : new boolean[] {false, true}) {
            String answer = send(request(base + "/api/upload_audiorecord/")
                .header("Content-Type", "multipart/form-data; boundary=frontier")
                .POST(form(id, token, wav, chunked))).body();
            link = between(answer, "\"URL for download\":\"", "\"");
        }
        send(request(link));
        send(request(link).DELETE().header("Authorization", "Bearer " + token));
        send(request(link));
    }
}
