"""Read conversations to tune on, from a field of messages or from fields that hold a prompt and its response."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lctrain.data.corpus import Document, Message
from lctrain.data.hub import HubRows
from lctrain.data.rows import JsonlRows, RowCorpus, field
from lctrain.errors import InputError

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, kw_only=True)
class ChatRows(RowCorpus):
    """A corpus in which every record is a conversation.

    Either `messages_field` names a list of {role, content}, or `prompt_fields` and `response_field` make a conversation
    of two messages. Prompt fields are joined by an empty line; missing and empty ones are left out, but not all may be.
    """

    messages_field: str | None
    prompt_fields: Sequence[str]
    response_field: str | None

    def __post_init__(self) -> None:
        super().__post_init__()
        in_columns = bool(self.prompt_fields) and self.response_field is not None
        if in_columns == (self.messages_field is not None) or bool(self.prompt_fields) != bool(self.response_field):
            raise InputError("a chat corpus needs messages_field, or prompt_fields and response_field, and not both")

    def documents(self) -> Iterator[Document]:
        for name, row in self.rows():
            yield Document(name=name, messages=self._messages(name, row))

    def _messages(self, name: str, row: dict[str, Any]) -> list[Message]:
        if self.messages_field is not None:
            return checked(name, field(name, row, self.messages_field))
        prompt = "\n\n".join(str(row[key]) for key in self.prompt_fields if row.get(key))
        response = field(name, row, str(self.response_field))
        if not prompt:
            raise InputError(f"{name}: none of {', '.join(self.prompt_fields)} holds a prompt")
        return checked(name, [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}])


def checked(name: str, messages: Any) -> list[Message]:
    """Return the messages if they are an optional system message, then user and assistant in turn, assistant last.

    Raises InputError for any other messages.
    """
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise InputError(f"{name}: messages must be a list of {{role, content}}")
    for i, message in enumerate(messages):
        if message.get("role") not in ROLES:
            raise InputError(f"{name}: message {i} has role {message.get('role')!r}; known are {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise InputError(f"{name}: message {i} has no text as content")
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        raise InputError(
            f"{name}: roles {', '.join(roles) or 'none'}; expected user and assistant in turn, answer last"
        )
    return [{"role": message["role"], "content": message["content"]} for message in messages]


@dataclass(frozen=True, kw_only=True)
class ChatJsonl(ChatRows, JsonlRows):
    """A corpus of conversations in JSONL."""


@dataclass(frozen=True, kw_only=True)
class ChatHub(ChatRows, HubRows):
    """A corpus of conversations in a dataset."""
