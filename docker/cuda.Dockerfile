# Palate on an NVIDIA GPU. From the repository: docker build -f docker/cuda.Dockerfile -t palate .
#   docker run --gpus all -v "$PWD:/data" palate train sdxl-dpo-24gb --train_data my_pairs/ --output_dir out/mine
FROM python:3.12-slim

ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    HF_HOME=/data/.cache/huggingface

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY palate ./palate
# PyTorch's wheels bring CUDA along; the host needs the driver alone.
RUN pip install -c constraints.txt '.[8bit,votes,tensorboard]' \
    && useradd --create-home palate \
    && mkdir /data \
    && chown palate /data

USER palate
WORKDIR /data
ENTRYPOINT ["palate"]
CMD ["--help"]
