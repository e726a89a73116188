# The project with all that it needs, set up as on any machine:
#   docker build -t sage-agent .                                      # --build-arg TEX=1 for the PDF too; PIP_EXTRA_INDEX_URL names a further package index, such as PyTorch's for CPUs
#   docker run --rm -p 8888:8888 -v sage-cache:/home/sage/.cache sage-agent         # JupyterLab; --gpus all where there are any
#   docker run --rm sage-agent make test
FROM python:3.11-slim AS system
ARG TEX=
RUN apt-get update \
 && apt-get install -y --no-install-recommends git make \
 && if [ -n "$TEX" ]; then DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends latexmk texlive-latex-recommended texlive-fonts-recommended texlive-latex-extra texlive-science; fi \
 && rm -rf /var/lib/apt/lists/*
# who is root installs TeX by itself in `make paper`; others say how
RUN useradd --create-home --uid 1000 sage && mkdir -p /home/sage/.cache && chown sage:sage /home/sage/.cache
USER sage
# a browser outside has to reach it; who opens it needs the token that is printed
RUN mkdir -p /home/sage/.jupyter && echo '{"ServerApp": {"ip": "0.0.0.0", "open_browser": false}}' > /home/sage/.jupyter/jupyter_server_config.json
WORKDIR /home/sage/agent
EXPOSE 8888

FROM system AS project
ARG PIP_EXTRA_INDEX_URL
COPY --chown=sage:sage Makefile pyproject.toml constraints.txt README.md ./
COPY --chown=sage:sage sage_paper sage_paper
RUN make setup && rm -rf /home/sage/.cache/pip
COPY --chown=sage:sage . .
CMD ["make", "lab"]
