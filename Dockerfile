# syntax=docker/dockerfile:1
# The gateway, and with another command the reference Agent Runtime. compose.yaml runs both.

ARG PYTHON=3.13-slim-bookworm

# ---- build: everything that pip needs stays here
FROM python:${PYTHON} AS build
WORKDIR /build
RUN python -m venv --without-pip /opt/gateway
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY gateway ./gateway
# The versions that were tested, and nothing that is not in them.
RUN pip --python /opt/gateway/bin/python install --no-cache-dir --no-compile -c constraints.txt '.[otel]'

# ---- run: Python and the packages, no compiler, no pip
FROM python:${PYTHON}
RUN python -m pip uninstall --yes --quiet --root-user-action=ignore pip \
    && groupadd --gid 10001 gateway \
    && useradd --uid 10001 --gid gateway --no-create-home --shell /usr/sbin/nologin gateway \
    && install --directory --owner gateway --group gateway /data
COPY --from=build /opt/gateway /opt/gateway
COPY hypercorn.toml /app/
WORKDIR /app
ENV PATH=/opt/gateway/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    GATEWAY__BIND=0.0.0.0:8000 \
    GATEWAY__STORE_URL=sqlite:////data/gateway.sqlite3
USER gateway
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
# Python, because nothing else is here that speaks HTTP. Ready, and not only alive: a store that cannot be
# used makes a gateway that cannot be used.
HEALTHCHECK --interval=10s --timeout=3s --start-period=15s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health?ready=1', timeout=2)"]
ENTRYPOINT ["gateway"]
CMD ["serve"]
