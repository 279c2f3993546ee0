# The packages are installed in a stage of their own, so that a change of the code does not install them again and
# nothing but Python, the packages and the service is in the result.
FROM python:3.11-slim AS packages

WORKDIR /build

COPY requirements.lock .
RUN python -m venv --without-pip /venv \
    && python -m pip --python /venv/bin/python install --no-cache-dir --disable-pip-version-check \
       --require-hashes -r requirements.lock

FROM python:3.11-slim

LABEL org.opencontainers.image.title="vote-aggregator" \
      org.opencontainers.image.description="Counts the votes of a RabbitMQ queue in PostgreSQL, each once" \
      org.opencontainers.image.version="1.0.0" \
      org.opencontainers.image.licenses="MIT"

RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin votes

ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /app
COPY --from=packages /venv /venv
COPY *.py init_db.sql ./
COPY web ./web
# a clone that was made under umask 077 has files that only its owner can read
RUN chmod -R go+rX /app

USER 10001
EXPOSE 8001
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen(f\"http://127.0.0.1:{os.environ.get('METRICS_PORT') or 8001}/healthz\", timeout=4)"]

# exec form: SIGTERM reaches the service itself
ENTRYPOINT ["python", "aggregator.py"]
