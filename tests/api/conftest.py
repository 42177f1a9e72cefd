"""A small model folder, a backend that sends what a test makes it send, and the application on a real socket."""

import asyncio
import http.client
import json
import subprocess
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from tandem.api.api_keys import ApiKeys
from tandem.api.app import create_app
from tandem.api.backend import EngineOperator, EngineState, Health, ModelCard, ServingDetails, TokenDelta, TokenRequest
from tandem.api.connections import Refusals
from tandem.api.http_server import Tls, bind, serve
from tandem.api.loaded_model import ModelLoader
from tandem.api.tokenizer import Tokenizer
from tandem.config import GenerationSource
from tandem.config_limits import LimitsSection
from tandem.ids import EngineIdentity
from tandem.wire.engine_status import EngineStatus, RequestCounts
from tandem.wire.messages import Register
from tests.support.registrations import make_register

EOS, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CORPUS = ["the quick brown fox jumps over the lazy dog", "hello world, hello there", "grüße aus köln, 東京 🙂🙃"] * 4
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MODEL = "tiny"
MODEL_LEN = 256


def byte_level() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    made.add_special_tokens([EOS, START, END])
    made.add_tokens(["<tool>", "<東>"])
    return made


def byte_fallback() -> tokenizers.Tokenizer:
    """As in Llama 2: SentencePiece's metaspace, and bytes for characters that are not in the vocabulary."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["\u2581", "\u2581the", "\u2581a", "h", "e", "l", "o", "\u2581\u2581", "lo", ",", "ü", "東"]
    made = tokenizers.Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    byte_level().save(str(path / "tokenizer.json"))
    config = {"chat_template": TEMPLATE, "eos_token": {"content": EOS}}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    """A certificate for localhost that has signed itself, and its key."""
    cert, key = (tmp_path_factory.mktemp("tls") / name for name in ("cert.pem", "key.pem"))
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(cert)]
    subprocess.run(["openssl", "req", "-x509", *kind, *names, *files], check=True, capture_output=True)
    return cert, key


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(byte_level())


def token_id(tokenizer: tokenizers.Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    assert found is not None
    return found


def ids(text: str) -> list[int]:
    return list(_BYTE_LEVEL.encode(text).ids)


_BYTE_LEVEL = byte_level()


def details(prefix_tokens: int = 3) -> ServingDetails:
    return ServingDetails(
        prefill_engine="p0",
        decode_engine="d0",
        disaggregated=True,
        reason=None,
        transport="tcp",
        queue_time=0.0,
        prefill_time=0.1,
        transfer_time=0.1,
        handoff_time=0.0,
        ttft=0.2,
        prefix_tokens={"p0": prefix_tokens, "d0": 0},
        blocks=1,
        bytes=1024,
        descriptors=1,
        recomputations=0,
    )


@dataclass
class ListedEngine:
    register: Register
    status: EngineStatus
    state: EngineState
    reason: str | None


def listed_engine(engine_id: str, role: str, state: EngineState) -> ListedEngine:
    counts = RequestCounts(waiting=1, waiting_for_kv=2, running=3)
    register = make_register(EngineIdentity(engine_id, "i"), role, requests=counts)
    reason = None if state is EngineState.READY else "its connection broke"
    return ListedEngine(register, register.status, state, reason)


Step = TokenDelta | Exception | Literal["hang"]
Script = Callable[[TokenRequest], Sequence[Step]]
HANG: Literal["hang"] = "hang"


def deltas(*parts: str, finish: str = "stop") -> list[TokenDelta]:
    """Return one delta for each part, then end-of-sequence."""
    eos = ids(EOS)
    found = [TokenDelta(ids(part), details=details()) for part in parts]
    if finish == "length":
        return [*found[:-1], TokenDelta(found[-1].token_ids, finish_reason="length", details=details())]
    return [*found, TokenDelta(eos, finish_reason="stop", stop_token_id=eos[0], details=details())]


@dataclass
class FakeBackend:
    """Answers every request with `script`'s steps: a delta is sent, an exception raised, HANG waits for ever."""

    folder: Path
    script: Script = lambda request: deltas("hello", " world")
    found: Health = field(default_factory=lambda: Health(True, "ready"))
    no_model: Exception | None = None
    requests: list[TokenRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    hanging: threading.Event = field(default_factory=threading.Event)
    closed: threading.Event = field(default_factory=threading.Event)

    def reset(self) -> None:
        self.__dict__.update(FakeBackend(self.folder).__dict__)

    async def model(self) -> ModelCard:
        if self.no_model is not None:
            raise self.no_model
        return ModelCard(MODEL, str(self.folder), MODEL_LEN, 1, aliases=("./models/tiny", "org/tiny"))

    async def generate(self, request: TokenRequest) -> AsyncGenerator[TokenDelta, None]:
        self.requests.append(request)
        ended = False
        try:
            for step in self.script(request):
                await asyncio.sleep(0)  # as a real one waits for its engines
                if isinstance(step, Exception):
                    ended = True
                    raise step
                if isinstance(step, str):
                    self.hanging.set()
                    await asyncio.Event().wait()
                else:
                    ended = step.finish_reason is not None
                    yield step
        finally:
            if not ended:
                self.aborted.append(request.request_id)
            self.closed.set()

    def health(self) -> Health:
        return self.found

    def engines(self) -> list[ListedEngine]:
        return [listed_engine("p0", "prefill", EngineState.READY), listed_engine("d0", "decode", EngineState.LOST)]


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        assert set(self.json) == {"error"}
        error: dict[str, Any] = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error

    @property
    def events(self) -> list[Any]:
        """Of a stream, without its comments; `[DONE]` as a string."""
        lines = [line for line in self.body.decode().split("\n\n") if line and not line.startswith(":")]
        assert all(line.startswith("data: ") for line in lines)
        return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


@dataclass
class Api:
    """The running application."""

    port: int
    backend: FakeBackend

    def send(self, method: str, path: str, body: Any = None, headers: Mapping[str, str | bytes] | None = None) -> Reply:
        connection = self.connect()
        raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request(method, path, raw, headers or {})
        response = connection.getresponse()
        reply = Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        connection.close()
        return reply

    def get(self, path: str, **headers: str) -> Reply:
        return self.send("GET", path, headers=headers)

    def complete(self, **body: Any) -> Reply:
        return self.send("POST", "/v1/completions", {"prompt": "hello"} | body)

    def chat(self, **body: Any) -> Reply:
        messages = {"messages": [{"role": "user", "content": "hello"}]}
        return self.send("POST", "/v1/chat/completions", messages | body)

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)

    def client(self, api_key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=api_key, max_retries=0)


@contextmanager
def running(
    backend: FakeBackend,
    kind: Literal["router", "engine"] = "router",
    keys: ApiKeys | None = None,
    limits: LimitsSection | None = None,
    tls: Tls | None = None,
    new_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop,
    operator: EngineOperator | None = None,
    source: GenerationSource = "auto",
) -> Iterator[Api]:
    """The application in a thread of its own, until the block ends."""
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    loop = new_loop()
    stop = asyncio.Event()

    def work() -> None:
        asyncio.set_event_loop(loop)
        loader, refusals = ModelLoader(backend, source), Refusals()
        app = create_app(backend, loader, kind=kind, keys=keys, limits=limits, refusals=refusals, operator=operator)
        loop.run_until_complete(serve(app, listener, stop, grace=1, limits=limits, tls=tls, refusals=refusals))
        loop.close()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield Api(port, backend)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[Api]:
    with running(FakeBackend(folder)) as found:
        yield found


@pytest.fixture
def api(shared: Api) -> Api:
    """A router's API whose backend is as new."""
    shared.backend.reset()
    return shared


@pytest.fixture(scope="module")
def shared_engine(folder: Path) -> Iterator[Api]:
    with running(FakeBackend(folder), kind="engine") as found:
        yield found


@pytest.fixture
def engine_api(shared_engine: Api) -> Api:
    """An engine's API whose backend is as new."""
    shared_engine.backend.reset()
    return shared_engine
