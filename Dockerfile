# A CPU image of the package. Build it, then let the demo write into a folder of yours:
#   docker build --tag mgipt_monai .
#   docker run --rm --volume "$PWD/demo:/output" --user "$(id -u):$(id -g)" mgipt_monai
FROM python:3.11-slim

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    MPLBACKEND=Agg \
    USER=mgipt \
    MPLCONFIGDIR=/tmp/matplotlib

WORKDIR /build
COPY constraints.txt ./
# first, so that a change of the package does not download torch again
RUN pip install --index-url https://download.pytorch.org/whl/cpu --constraint constraints.txt torch
COPY setup.cfg setup.py pyproject.toml README.md LICENSE ./
COPY bundle bundle
COPY configs configs
COPY mgipt_monai mgipt_monai
RUN pip install --constraint constraints.txt ".[demo]" \
    && useradd --create-home --uid 1000 mgipt \
    && install --directory --owner mgipt --group mgipt /output

USER 1000
WORKDIR /output
VOLUME /output
ENTRYPOINT ["mgipt"]
CMD ["demo", "--folder", "/output"]
