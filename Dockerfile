# The image that trains: one entrypoint, `python -m job`, for any Docker host, Slurm and Kubernetes.
# `make build` builds it, `make test-image` shows that it works. BuildKit or Buildah/Podman; no registry but the base's is asked.

# "base" is CUDA's smallest variant: the driver's interface and no libraries, since torch's wheels bring their own.
# The lock's torch is built for CUDA 13.0. `make pin-base` adds the digest.
ARG BASE_IMAGE=nvidia/cuda:13.0.2-base-ubuntu24.04
# An image with wheels in its root that no package index has; by default there is none.
ARG WHEELS=scratch

FROM ${WHEELS} AS wheels

# --- what the base's distribution gives, for both stages below ---------------------------------------------------------
FROM ${BASE_IMAGE} AS system
# A mirror of the distribution's archive, as http://mirrors.tuna.tsinghua.edu.cn/ubuntu; both stages then use it.
ARG APT_MIRROR
# Triton compiles C of its own when a kernel is first launched: that takes gcc, the C library's headers and Python's.
# NCCL opens InfiniBand and RoCE through libibverbs and the providers of the cards; without them it takes TCP.
# (Ubuntu 24.04 gives librdmacm1t64 for librdmacm1.)
RUN --mount=type=bind,source=launch/apt.sh,target=/apt.sh \
    --mount=type=secret,id=ca,target=/run/secrets/ca \
    sh /apt.sh ca-certificates gcc ibverbs-providers libc6-dev libibverbs1 librdmacm1 python3 python3-dev tini
# A version of Amazon's installer, as 1.40.0, for nodes of AWS with EFA; by default it is left out.
ARG EFA_VERSION
RUN --mount=type=bind,source=launch/efa.sh,target=/efa.sh \
    --mount=type=secret,id=ca,target=/run/secrets/ca \
    sh /efa.sh "${EFA_VERSION}"

# --- the virtual environment, none of whose tools reach the image -------------------------------------------------------
FROM system AS builder
ARG APT_MIRROR
RUN --mount=type=bind,source=launch/apt.sh,target=/apt.sh \
    --mount=type=secret,id=ca,target=/run/secrets/ca \
    sh /apt.sh python3-venv
# A certificate bundle and index credentials of this place come as build secrets, and stay in no layer.
ENV CERTIFICATES=/etc/ssl/certs/ca-certificates.crt
ENV PIP_CERT=${CERTIFICATES} SSL_CERT_FILE=${CERTIFICATES}
# A mirror of the package index; its credentials, if any, belong in the secret `netrc`.
ARG INDEX_URL=https://pypi.org/simple
COPY launch/image-tools.lock /locks/
RUN --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    --mount=type=secret,id=netrc,target=/root/.netrc \
    python3 -m venv /opt/tools \
    && /opt/tools/bin/pip install --no-cache-dir --index-url "${INDEX_URL}" --require-hashes -r /locks/image-tools.lock
# Another lock may stand among the wheels; one that lists no hashes is refused.
ARG LOCK=/locks/requirements-image.lock
COPY requirements-image.lock /locks/
# Compiled now, because the image's root is read-only when it runs.
RUN --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    --mount=type=secret,id=netrc,target=/root/.netrc \
    --mount=type=bind,from=wheels,target=/wheels \
    --mount=type=cache,target=/root/.cache/uv \
    /opt/tools/bin/uv venv --no-config --python /usr/bin/python3 /opt/venv \
    && /opt/tools/bin/uv pip install --no-config --python /opt/venv --link-mode copy --compile-bytecode \
        --index-url "${INDEX_URL}" --find-links /wheels \
        --no-deps --require-hashes --build-constraints "${LOCK}" -r "${LOCK}" \
    && /opt/tools/bin/uv pip check --no-config --python /opt/venv \
    && /opt/tools/bin/cyclonedx-py environment --output-reproducible --of JSON -o /opt/sbom.cdx.json /opt/venv

# --- the image --------------------------------------------------------------------------------------------------------
FROM system
# Root's group owns what is writable, and the home is open to all: so it runs as this user and as any other.
RUN useradd --uid 10001 --gid 0 --home-dir /scratch --no-create-home --shell /usr/sbin/nologin wikillm \
    && install --directory --mode 1777 /scratch
COPY --from=builder /opt/venv /opt/venv
COPY --from=builder /opt/sbom.cdx.json /app/sbom.cdx.json
# Found from any working directory. A user without an entry in /etc/passwd has a name all the same.
ENV PATH=/opt/venv/bin:${PATH} \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    USER=wikillm \
    LOGNAME=wikillm
# All that is written at run time goes to one volume (and /tmp). All users can write to it, so `python -m job` makes a
# folder for its user alone in it, and has HOME and the libraries' caches point there (job/local_dirs.py).
ENV HOME=/scratch \
    WIKILLM_SCRATCH=/scratch
WORKDIR /app
COPY LICENSE ./
COPY configs configs
COPY job job
# What .dockerignore cannot tell from a folder, a file without a dot in its name, ends the build.
RUN found=$(find job ! -type d ! -name '*.py' ! -path job/demo/sample.jsonl ! -path job/demo/LICENSE) \
    && { test -z "$found" || { echo "below job/, but no code, so move it away: $found" >&2; exit 1; }; } \
    && PYTHONDONTWRITEBYTECODE='' python -m compileall -q job && chmod -R a+rX /app
USER 10001:0
# Nothing is published that does not train: three steps on this machine's CPU, as the user it will run as, leaving nothing.
RUN --mount=type=bind,source=launch/smoke.sh,target=/smoke.sh \
    --mount=type=tmpfs,target=/scratch --mount=type=tmpfs,target=/tmp \
    sh /smoke.sh
VOLUME /scratch
# As the first process of a container: tini reaps what training leaves and passes signals on.
ENTRYPOINT ["tini", "--", "python", "-m", "job"]
ARG REVISION=unknown
ARG VERSION=unknown
ARG CREATED=unknown
ARG SOURCE=unknown
ARG BASE_IMAGE
ENV WIKILLM_REVISION=${REVISION}
LABEL org.opencontainers.image.title="WikiLLM" \
      org.opencontainers.image.description="Pretrains a Chinese language model from raw Wikipedia" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}"
