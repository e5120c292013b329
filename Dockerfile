# The sidecar's image: a virtual environment on the official Python image and nothing else. Runs as any user, on a read-only root,
# without a shell. The demo's trading bot is in it too: python -m sidecar.demo.bot.

ARG PYTHON_IMAGE=docker.io/library/python:3.13-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
# Every package is checked against its locked hash, and none is built from source but our own.
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN ["python3", "-m", "venv", "/build"]
RUN ["python3", "-m", "venv", "--without-pip", "/opt/killswitch"]
COPY .ci/requirements.txt .ci/requirements-build.txt /src/.ci/
RUN ["/build/bin/python", "-m", "pip", "--python", "/opt/killswitch/bin/python", "install", "--require-hashes", "--no-deps", \
     "--only-binary", ":all:", "--no-compile", "--requirement", "/src/.ci/requirements.txt"]
RUN ["/build/bin/python", "-m", "pip", "install", "--require-hashes", "--no-deps", "--only-binary", ":all:", "--no-compile", \
     "--requirement", "/src/.ci/requirements-build.txt"]
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY rules rules
COPY sidecar sidecar
RUN ["/build/bin/python", "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "/src/dist", "/src"]
# Offline: the wheel that was just built and what is installed already are all there is.
RUN ["/build/bin/python", "-m", "pip", "--python", "/opt/killswitch/bin/python", "install", "--no-index", "--no-deps", \
     "--no-compile", "--find-links", "/src/dist", "killswitch-sidecar"]
# Byte code now: the root is read-only at run time, and compiling at each start would take longer than all the rest of it. Checked
# by hash, not by time, so that the layer is the same whenever it is built.
RUN ["/opt/killswitch/bin/python", "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", "/opt/killswitch/lib"]

FROM ${PYTHON_IMAGE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="killswitch-sidecar" \
      org.opencontainers.image.description="A kill switch that stands next to each trading pod and fails closed" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build /opt/killswitch /opt/killswitch
ENV PATH=/opt/killswitch/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    MALLOC_ARENA_MAX=2
# The gate (loopback of the pod) and operations: metrics, health, API, web page, webhook.
EXPOSE 9780/tcp 9781/tcp
# Numeric, so that runAsNonRoot can be checked; any other user works as well, for nothing in the image is written to.
USER 65532:65532
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=10s --start-period=10s CMD ["killswitch", "live"]
ENTRYPOINT ["killswitch"]
CMD ["serve"]
