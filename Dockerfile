# The router. Workers run in vLLM images of their own, with eldr's connector installed there (docs/vllm.md).
FROM python:3.11-slim AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE ./
COPY constraints/dev.txt constraints/
COPY build_backend build_backend
COPY src src
RUN python -m venv /opt/eldr
RUN ELDR_COMPILE=1 /opt/eldr/bin/pip install --no-cache-dir --constraint constraints/dev.txt '.[router,peers,zstd]'

# The same Python as above: the environment refers to its interpreter.
FROM python:3.11-slim
RUN useradd --system --uid 10001 --no-create-home eldr
COPY --from=build /opt/eldr /opt/eldr
ENV PATH=/opt/eldr/bin:$PATH
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["python", "-c", "import http.client; router = http.client.HTTPConnection('127.0.0.1', 8000, timeout=4); router.request('GET', '/health'); raise SystemExit(router.getresponse().status != 200)"]
ENTRYPOINT ["eldr", "serve", "--host", "0.0.0.0"]
