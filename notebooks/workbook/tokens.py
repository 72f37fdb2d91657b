"""Text to token ids, and messages to text, by a model folder's own files.

transformers does the same and imports torch for it: four seconds and 300 MB for what two small libraries
do. The tests hold both to the same results.
"""
import datetime
import json
from pathlib import Path
from typing import Any

from workbook.errors import BadInput

DATE = datetime.date(2026, 1, 1)
"""What a chat template is told that cannot do without a date: one, or the prompts would be others every day."""


class Tokenizer:
    """The tokenizer of a model folder.

    Attributes:
        vocabulary: number of token ids, those added for special tokens included.
    """

    def __init__(self, folder: Path):
        """Raises BadInput if tokenizer.json is broken."""
        from tokenizers import Tokenizer as Backend
        path = folder / "tokenizer.json"
        if path.exists():
            try:
                self._backend = Backend.from_file(str(path))
            except Exception as error:  # the library raises no other
                raise BadInput(f"{path}: is no tokenizer ({error}); expected a complete tokenizer.json") from None
            # A file may ask for padding or truncation: both would change what is measured.
            self._backend.no_padding()
            self._backend.no_truncation()
        else:
            from transformers import AutoTokenizer
            self._backend = AutoTokenizer.from_pretrained(folder).backend_tokenizer
        self._folder = folder
        self._config = _json(folder / "tokenizer_config.json")
        self._template = None
        self.vocabulary = self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, texts: list[str], special: bool = True) -> list[list[int]]:
        """Token ids of each text; `special`: with those that the tokenizer itself puts around a text."""
        return [e.ids for e in self._backend.encode_batch_fast(texts, add_special_tokens=special)]

    def special(self) -> dict[int, str]:
        """Text of the ids with a meaning of their own (end of text, roles)."""
        return {number: token.content for number, token in self._backend.get_added_tokens_decoder().items() if token.special}

    def ends(self) -> set[int]:
        """Those of them that the folder names as end, beginning, padding or unknown: what no answer has in its middle."""
        named = {_content(v) for k, v in self._config.items() if k.endswith("_token") and v and not isinstance(v, bool)}
        return {number for number, text in self.special().items() if text in named}

    def special_ids(self) -> set[int]:
        """All of them."""
        return set(self.special())

    def chat(self, text: str) -> str:
        """A user's message in the model's chat template, up to where the answer begins.

        Raises:
            BadInput: the folder has no template, or one that cannot be rendered.
        """
        from jinja2.exceptions import TemplateError, UndefinedError
        named = {k: _content(v) for k, v in self._config.items() if k.endswith("_token") and v}
        given = {"messages": [{"role": "user", "content": text}], "add_generation_prompt": True} | named
        try:
            if self._template is None:
                self._template = _compiled(self._folder, self._config)
            try:
                return self._template.render(given)
            except UndefinedError as error:  # most that know this function do without it
                if "strftime_now" not in str(error):
                    raise
                return self._template.render(given, strftime_now=DATE.strftime)
        except TemplateError as error:
            raise BadInput(f"key 'chat_template' is true: the chat template in {self._folder} cannot be rendered ({type(error).__name__}: {error}); expected one "
                           "that transformers documents, or false") from None


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else token


def _compiled(folder: Path, config: dict[str, Any]):
    """The chat template in the sandbox that transformers documents for it ("Writing a chat template")."""
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    path = folder / "chat_template.jinja"
    source = path.read_text() if path.exists() else config.get("chat_template")
    if isinstance(source, list):  # several by name, as transformers also takes them
        source = {t["name"]: t["template"] for t in source}.get("default")
    if not source:
        raise BadInput(f"key 'chat_template' is true: {folder} has no chat template; expected false, or chat_template.jinja in the folder")

    def refuse(message: str):
        raise TemplateError(message)

    class Generation(Extension):
        """`{% generation %}` marks for training what the assistant says, and changes no text."""
        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation])
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = refuse
    return environment.from_string(source)
