# The training image: one entrypoint, `python -m job`, for any Docker host, Slurm and Kubernetes.
# `make build` builds it and `make test-image` tests it. It needs BuildKit or Buildah/Podman, and only the base's registry.

# "base" is the smallest CUDA variant. It has no CUDA libraries, because torch's wheels contain them.
# The torch in the lock file is built for CUDA 13.0. `make pin-base` adds the digest. `make build CUDA=12` uses another base
# and torch, for drivers below 580 and for V100 (launch/image.sh).
ARG BASE_IMAGE=nvidia/cuda:13.0.2-base-ubuntu24.04
# Optional: an image that has wheels in its root folder which no package index offers.
ARG WHEELS=scratch

FROM ${WHEELS} AS wheels

# --- System packages, for both stages below ----------------------------------------------------------------------------
FROM ${BASE_IMAGE} AS system
# Optional: a mirror of the distribution's archive, such as http://mirrors.tuna.tsinghua.edu.cn/ubuntu, for both stages.
ARG APT_MIRROR
# Triton compiles C code when a kernel is first launched. This needs gcc and the headers of the C library and of Python.
# NCCL uses InfiniBand and RoCE through libibverbs and the drivers for the cards. Without them it falls back to TCP.
# (Ubuntu 24.04 installs librdmacm1t64 for librdmacm1.)
RUN --mount=type=bind,source=launch/apt.sh,target=/apt.sh \
    --mount=type=secret,id=ca,target=/run/secrets/ca \
    sh /apt.sh ca-certificates gcc ibverbs-providers libc6-dev libibverbs1 librdmacm1 python3 python3-dev tini
# Optional: a version of Amazon's EFA installer, such as 1.40.0, for AWS nodes with EFA.
ARG EFA_VERSION
RUN --mount=type=bind,source=launch/efa.sh,target=/efa.sh \
    --mount=type=secret,id=ca,target=/run/secrets/ca \
    sh /efa.sh "${EFA_VERSION}"

# --- The virtual environment. The build tools stay in this stage and are not in the image. -------------------------------
FROM system AS builder
ARG APT_MIRROR
RUN --mount=type=bind,source=launch/apt.sh,target=/apt.sh \
    --mount=type=secret,id=ca,target=/run/secrets/ca \
    sh /apt.sh python3-venv
# A certificate bundle and index credentials of the site are build secrets, so no layer contains them.
ENV CERTIFICATES=/etc/ssl/certs/ca-certificates.crt
ENV PIP_CERT=${CERTIFICATES} SSL_CERT_FILE=${CERTIFICATES}
# Optional: a mirror of the package index. Pass its credentials in the secret `netrc`.
ARG INDEX_URL=https://pypi.org/simple
COPY launch/image-tools.lock /locks/
RUN --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    --mount=type=secret,id=netrc,target=/root/.netrc \
    python3 -m venv /opt/tools \
    && /opt/tools/bin/pip install --no-cache-dir --index-url "${INDEX_URL}" --require-hashes -r /locks/image-tools.lock
# Optional: another lock file from the wheels image. A lock file without hashes is refused.
ARG LOCK=/locks/requirements-image.lock
COPY requirements-image.lock /locks/
# Optional: another build of torch and the index that has it; `make build CUDA=12` sets both.
ARG TORCH
ARG TORCH_INDEX
# Bytecode is compiled here, because the root file system is read-only when the image runs.
RUN --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    --mount=type=secret,id=netrc,target=/root/.netrc \
    --mount=type=bind,from=wheels,target=/wheels \
    --mount=type=cache,target=/root/.cache/uv \
    --mount=type=bind,source=launch/install.sh,target=/install.sh \
    /opt/tools/bin/uv venv --no-config --python /usr/bin/python3 /opt/venv \
    && sh /install.sh "${LOCK}" "${TORCH}" "${TORCH_INDEX}" \
    && /opt/tools/bin/cyclonedx-py environment --output-reproducible --of JSON -o /opt/sbom.cdx.json /opt/venv

# --- The image --------------------------------------------------------------------------------------------------------
FROM system
# The image also runs as any other user, because everybody may write to the home folder.
RUN useradd --uid 10001 --gid 0 --home-dir /scratch --no-create-home --shell /usr/sbin/nologin wikillm \
    && install --directory --mode 1777 /scratch
COPY --from=builder /opt/venv /opt/venv
COPY --from=builder /opt/sbom.cdx.json /app/sbom.cdx.json
# PYTHONPATH makes `job` importable from any working directory. USER and LOGNAME give a user without an entry in
# /etc/passwd a name.
ENV PATH=/opt/venv/bin:${PATH} \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    USER=wikillm \
    LOGNAME=wikillm
# At run time only this volume and /tmp are written. All users can write to the volume, so `python -m job` creates a
# private folder in it for its user, and sets HOME and the libraries' caches to that folder (job/local_dirs.py).
ENV HOME=/scratch \
    WIKILLM_SCRATCH=/scratch
WORKDIR /app
COPY LICENSE ./
COPY configs configs
COPY job job
# .dockerignore cannot exclude files without a dot in their name, so the build fails if there are any.
RUN found=$(find job ! -type d ! -name '*.py' ! -path job/demo/sample.jsonl ! -path job/demo/LICENSE) \
    && { test -z "$found" || { echo "job/ contains files that are not code: $found: move them out of job/" >&2; exit 1; }; } \
    && PYTHONDONTWRITEBYTECODE='' python -m compileall -q job && chmod -R a+rX /app
USER 10001:0
# The build trains three steps on the CPU, as the image's user, so that no broken image is pushed. It leaves no files.
RUN --mount=type=bind,source=launch/smoke.sh,target=/smoke.sh \
    --mount=type=tmpfs,target=/scratch --mount=type=tmpfs,target=/tmp \
    sh /smoke.sh
VOLUME /scratch
# tini is the first process of the container: it removes zombie processes and forwards signals.
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
