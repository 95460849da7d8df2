# vLLM workers with eldr's connector: docker build --file deploy/examples/vllm.Dockerfile --tag vllm-eldr .
# The context is the repository, whose .dockerignore lets in what is copied here.
FROM vllm/vllm-openai:v0.32.0
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE ./
COPY build_backend build_backend
COPY src src
# Beside vLLM: --no-deps, so that nothing which vLLM has pinned changes. NIXL is not in every build of the image.
RUN pip install --no-cache-dir --no-deps . && pip install --no-cache-dir nixl
