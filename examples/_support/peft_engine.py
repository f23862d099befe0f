"""A small engine that speaks OpenAI's protocol over plain transformers and PEFT, to try a client without a real one."""

import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn


class PeftEngine:
    """Serves adapters of one base model, as a context manager.

    Args:
        base: The model, which gets the adapters.
        tokenizer: Its tokenizer.
        folders: Folder of each adapter, by its name.

    Attributes:
        url: Address of the API.
        model: The model with its adapters.
    """

    def __init__(self, base: nn.Module, tokenizer, folders: Mapping[str, Path]) -> None:
        (first, folder), *others = folders.items()
        self.model = PeftModel.from_pretrained(base, str(folder), adapter_name=first)
        for name, folder in others:
            self.model.load_adapter(str(folder), adapter_name=name)
        self.model.eval()
        self.tokenizer = tokenizer
        self.names = list(folders)
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> "PeftEngine":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def text_of(self, token: int) -> str:
        """Return the text of a token."""
        return self.tokenizer.decode([token])

    def reply(self, path: str, body: Mapping[str, Any]) -> tuple[int, Any]:
        """Return status and content of the answer to a request for a completion."""
        name = body.get("model", self.names[0])
        if name not in self.names:
            return 404, {"error": {"message": f"The model {name!r} does not exist."}}
        ids = self.tokenizer(body["prompt"], return_tensors="pt")["input_ids"]
        with self._lock, torch.no_grad():
            # One adapter per row: PEFT's form of a batch with several adapters.
            logits = self.model(input_ids=ids, adapter_names=[name]).logits[0, -1]
        if allowed := body.get("allowed_token_ids"):  # as vLLM with --logprobs-mode processed_logprobs
            kept = torch.full_like(logits, -9999.0)
            kept[allowed] = logits[allowed]
            logits = kept
        log_probs = logits.double().log_softmax(-1)
        top = log_probs.topk(min(int(body["logprobs"]), len(log_probs)))
        pairs = [(self.text_of(i), value) for i, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)]
        choice = {"text": pairs[0][0], "logprobs": {"top_logprobs": [dict(reversed(pairs))]}}
        return 200, {"choices": [choice], "usage": {"prompt_tokens": ids.shape[1]}}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        engine = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(200, {"data": [{"id": name} for name in engine.names]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self._answer(*engine.reply(self.path, body))

            def _answer(self, status: int, content: Any) -> None:
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: object) -> None:
                pass

        return Handler
