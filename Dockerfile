# The server of a model (docs/serve.md). On CPUs, or with an accelerator's extra:
#
#   docker build -t moss-audio-jax .
#   docker build -t moss-audio-jax:cuda --build-arg EXTRA=cuda .
#   docker build -t moss-audio-jax:tpu --build-arg EXTRA=tpu .
#
#   docker run --stop-timeout 40 -p 127.0.0.1:8000:8000 -e MOSS_AUDIO_JAX_API_KEY=... moss-audio-jax
#   docker run ... -v DIR:/model:ro moss-audio-jax serve --host 0.0.0.0 --checkpoint /model
#
# Docker kills 10 s after SIGTERM unless it is told otherwise; answers get --drain-seconds, 30 s.
# Any other verb may stand in the place of `serve`.
FROM python:3.12-slim

# cuda, tpu, or nothing. The wheels of JAX hold CUDA; the host has the driver.
ARG EXTRA=

COPY . /source
RUN pip install --no-cache-dir "/source[serve${EXTRA:+,$EXTRA}]" && rm -r /source

# Nobody's files but its cache of compiled programs, which a volume may keep.
RUN useradd --uid 10001 --create-home moss \
    && install -d -o moss /cache
ENV XDG_CACHE_HOME=/cache
USER 10001
WORKDIR /home/moss
VOLUME /cache
EXPOSE 8000

# The first start compiles programs and may load many gigabytes. curl is not in the image.
HEALTHCHECK --interval=15s --timeout=5s --start-period=10m \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]

# As a list, so that the server is process 1 itself and SIGTERM reaches it.
ENTRYPOINT ["moss-audio-jax"]
# Without a key in the environment it refuses an address that others reach, and ends with 2.
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]
