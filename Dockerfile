# effnet serve without torch. Never tried: Docker was not available where it was written.
#
#     docker build -t effnet .
#     docker run -p 8000:8000 -v ./runs/train/latest/best:/best:ro effnet best=/best
FROM python:3.11-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++
COPY pyproject.toml README.md LICENSE hatch_build.py /effnet/
COPY native /effnet/native
COPY src /effnet/src
RUN EFFNET_BUILD=required pip install --no-cache-dir --prefix=/installed '/effnet[serve]'

FROM python:3.11-slim
COPY --from=build /installed /usr/local
USER 1000
EXPOSE 8000
ENTRYPOINT ["effnet", "serve", "--host", "0.0.0.0"]
CMD ["lite0"]
