# docker build -t transfertransfo . && docker run -it transfertransfo
#
# The image contains the project and chats with the default bot. To use other models and data:
# docker run -it -v "$PWD/runs:/app/runs" transfertransfo python interact.py --model_checkpoint runs/…
FROM python:3.11-slim

RUN useradd --create-home app
WORKDIR /app
COPY requirements.txt ./
COPY requirements/base.txt requirements/
RUN pip install --no-cache-dir -r requirements.txt && pip install --no-cache-dir --no-deps -r requirements/base.txt

COPY --chown=app . .
RUN mkdir -p runs && chown app /app runs
USER app

CMD ["python", "interact.py", "--model_checkpoint", "persona"]
