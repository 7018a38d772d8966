# Palate without a GPU: votes, reports, and the miniature world. docker build -f docker/cpu.Dockerfile -t palate-cpu .
#   docker run -v "$PWD:/data" palate-cpu train miniature-dpo --output_dir out/first
FROM python:3.12-slim

ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    HF_HOME=/data/.cache/huggingface

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY palate ./palate
RUN pip install --extra-index-url https://download.pytorch.org/whl/cpu -c constraints.txt '.[votes,tensorboard]' \
    && useradd --create-home palate \
    && mkdir /data \
    && chown palate /data

USER palate
WORKDIR /data
ENTRYPOINT ["palate"]
CMD ["--help"]
