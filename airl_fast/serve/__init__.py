"""The learned reward as an HTTP service: `airl-fast serve RUN`. Needs the extra `serve` (FastAPI and uvicorn)."""
