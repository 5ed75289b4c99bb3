# syntax=docker/dockerfile:1.7
# The service as an image:
#   docker build --target cpu -t gma-service:cpu .
#   docker build --target gpu --build-context kernels=kernels -t gma-service:gpu .
# docs/deploy.md says how the folder of kernels is made. What runs has no compiler, runs as nobody in
# particular, and writes to /tmp and /dev/shm alone.

ARG BASE=python:3.11.14-slim-trixie

FROM ${BASE} AS base
ENV PATH=/opt/gma/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1

# --- What is installed, with a compiler for the kernels ---

FROM base AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libonnxruntime-dev \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/gma
WORKDIR /src
# Dependencies come before the source: an edit of that installs ours anew and nothing else. They are
# those of a package with nothing in it.
COPY requirements.lock pyproject.toml hatch_build.py ./
RUN mkdir gma && touch README.md LICENSE NOTICE

FROM build AS cpu-build
# An index whose torch is built for CPUs alone; without it, pip's own, whose torch is 2 GB larger.
ARG TORCH_INDEX=
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint requirements.lock ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
# More of the package's extras, as batch,files.
ARG EXTRAS=
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint requirements.lock hatchling \
    && pip install --constraint requirements.lock --no-build-isolation \
        ".[hub,onnx,redis,traces${EXTRAS:+,$EXTRAS}]"
COPY . .
RUN pip install --no-deps --force-reinstall --no-build-isolation .
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --no-deps ./export/ops --config-settings=cmake.define.GMA_CUDA=OFF

FROM build AS gpu-build
ARG TORCH_INDEX=
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint requirements.lock ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch triton
ARG EXTRAS=
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint requirements.lock hatchling onnxruntime-gpu==1.31.1 \
    && pip install --constraint requirements.lock --no-build-isolation \
        ".[hub,onnx-gpu,redis,traces${EXTRAS:+,$EXTRAS}]"
COPY . .
RUN pip install --no-deps --force-reinstall --no-build-isolation .
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --no-deps ./export/ops --config-settings=cmake.define.GMA_CUDA=ON \
      --config-settings=cmake.define.GMA_PYTHON=/opt/gma/bin/python
# Run on a GPU, this stage compiles the kernels that the stage `gpu` then takes.
ENTRYPOINT ["gma", "compile", "--cache", "/kernels"]

# --- What runs ---

FROM base AS service
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="gma-service" \
      org.opencontainers.image.description="Classifies documents of any length over HTTP." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# Ray asks for the user's name, and Triton and torch for a home.
# KubeRay's own commands may run in a login shell, which forgets PATH.
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin gma \
    && echo 'PATH=/opt/gma/bin:$PATH' > /etc/profile.d/gma.sh
ENV HOME=/tmp \
    GMA_HOST=0.0.0.0
WORKDIR /tmp
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as http; http.urlopen('http://127.0.0.1:' + os.environ.get('GMA_PORT', '8000') + '/health', timeout=4)"]
ENTRYPOINT ["gma"]
CMD ["serve"]

FROM service AS cpu
COPY --from=cpu-build /opt/gma /opt/gma
USER 10001:10001

FROM service AS gpu
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    GMA_COMPILE_CACHE=/opt/kernels
COPY --from=gpu-build /opt/gma /opt/gma
# A build context, not a stage. Without the manifest the build fails: there would be no kernels, and
# no compiler to make them.
COPY --from=kernels manifest.json /opt/kernels/manifest.json
COPY --from=kernels kernels /opt/kernels/kernels
USER 10001:10001
