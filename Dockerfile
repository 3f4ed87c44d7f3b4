# docker build -t transfertransfo . && docker run -it transfertransfo
#
# The image holds the project and a tiny model trained on small talk made of templates, and chats with it. Other models and
# data: docker run -it -v "$PWD/runs:/app/runs" transfertransfo python interact.py --model_checkpoint runs/…
FROM python:3.11-slim

RUN useradd --create-home app
WORKDIR /app
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt

COPY --chown=app . .
RUN chown app /app
USER app
# What only another training would need goes again, or every pull would carry it.
RUN ./recipes/demo.sh && rm -rf runs/*/checkpoints

CMD ["sh", "-c", "exec python interact.py --model_checkpoint runs/*_tiny --dataset_path .demo/tiny_corpus.json"]
