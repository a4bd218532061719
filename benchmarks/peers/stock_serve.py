"""Four plain Ray Serve deployments with the stock `@serve.batch`: `serve run stock_serve:app`."""

from embedder import MAX_BATCH_SIZE, Embedder, model_path
from fastapi import FastAPI, Request
from ray import serve

api = FastAPI()


@serve.deployment(max_ongoing_requests=512, ray_actor_options={"num_cpus": 0.2})
class Tokenizer:
    def __init__(self):
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(model_path())

    async def __call__(self, text):
        return self.tokenizer(text, truncation=True, max_length=256)["input_ids"]


@serve.deployment(max_ongoing_requests=512, ray_actor_options={"num_cpus": 1})
class Model:
    def __init__(self):
        import torch

        self.torch = torch
        self.embedder = Embedder()

    @serve.batch(max_batch_size=MAX_BATCH_SIZE, batch_wait_timeout_s=0.005)
    async def __call__(self, ids):
        import asyncio

        return await asyncio.to_thread(self.run, ids)

    def run(self, ids):
        torch = self.torch
        tokens = self.embedder.tokenizer.pad({"input_ids": ids}, return_tensors="pt")
        with torch.inference_mode():
            return list(self.embedder.model(**tokens).last_hidden_state.float().mean(1).numpy())


@serve.deployment(max_ongoing_requests=512, ray_actor_options={"num_cpus": 0.1})
class Postprocessor:
    async def __call__(self, vector):
        return vector.tolist()


@serve.deployment(max_ongoing_requests=512, ray_actor_options={"num_cpus": 0.2})
@serve.ingress(api)
class Ingress:
    def __init__(self, tokenizer, model, postprocessor):
        self.tokenizer, self.model, self.postprocessor = tokenizer, model, postprocessor

    @api.post("/v1/embeddings")
    async def embed(self, request: Request):
        body = await request.json()
        ids = await self.tokenizer.remote(body["input"][0])
        vector = await self.model.remote(ids)
        return {"data": [{"index": 0, "embedding": await self.postprocessor.remote(vector)}]}


app = Ingress.bind(Tokenizer.bind(), Model.bind(), Postprocessor.bind())
