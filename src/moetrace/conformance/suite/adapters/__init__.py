"""How engines are asked, one file per dialect. `http` and what builds on it need httpx; `process` needs nothing."""
