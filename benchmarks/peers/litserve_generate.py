"""LitServe around `generate`, streaming as in its documentation: `python litserve_generate.py PORT FOLDER DTYPE`."""

import json
import sys
from threading import Thread

import litserve as ls
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer


class ChatAPI(ls.LitAPI):
    def setup(self, device):  # noqa: ARG002
        torch.set_num_threads(1)
        self.tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
        self.model = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=getattr(torch, sys.argv[3])).eval()

    def decode_request(self, request):
        return request

    def predict(self, request):
        text = self.tokenizer.apply_chat_template(request["messages"], tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        settings = {"max_new_tokens": request["max_tokens"], "do_sample": False, "streamer": streamer}
        settings |= {"min_new_tokens": request["max_tokens"]}
        Thread(target=self.model.generate, args=(ids,), kwargs=settings).start()
        yield from streamer

    def encode_response(self, output):
        for text in output:
            yield "data: " + json.dumps({"choices": [{"index": 0, "delta": {"content": text}}]}) + "\n\n"


if __name__ == "__main__":
    api = ChatAPI(api_path="/v1/chat/completions", stream=True)
    server = ls.LitServer(api, accelerator="cpu", timeout=600)
    server.run(port=int(sys.argv[1]), generate_client_file=False, log_level="warning")
