# Triton with svd-trt, for the models that `svd-trt triton` writes. From the root of the repository:
#
#     docker build -t svd-trt-triton -f deploy/triton.Dockerfile .
#
# `svd-trt triton` prints the command that runs it.
ARG TRITON=25.08
FROM nvcr.io/nvidia/tritonserver:${TRITON}-py3

COPY pyproject.toml README.md LICENSE constraints.txt /opt/svd-trt/
COPY benchmarks /opt/svd-trt/benchmarks
COPY engine /opt/svd-trt/engine
COPY export /opt/svd-trt/export
COPY runtime /opt/svd-trt/runtime
COPY src /opt/svd-trt/src

# What runs the bundle on a GPU: rtx, tensorrt or gpu.
ARG EXTRAS=rtx
# Triton's Python backend is built for numpy 1 in many of its versions, and svd-trt's runtime takes both.
RUN sed -i '/^numpy==/d' /opt/svd-trt/constraints.txt \
    && python3 -m pip install --no-cache-dir -c /opt/svd-trt/constraints.txt "/opt/svd-trt[${EXTRAS}]" 'numpy<2' \
    && useradd --system --uid 10001 --user-group svd-trt

USER 10001:10001
EXPOSE 8000 8001 8002
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s \
    CMD ["curl", "--silent", "--fail", "--output", "/dev/null", "http://127.0.0.1:8000/v2/health/ready"]
CMD ["tritonserver", "--model-repository=/models"]
