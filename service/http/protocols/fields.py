"""What the requests of other servers' clients have in common: members that are passed over if
nobody here knows them, as those servers do, and texts, one or a list of them."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, WithJsonSchema
from pydantic import ValidationError as Invalid

from gma.model.config import problems
from gma.service.errors import Validation
from gma.service.gateway.document import Pieces
from gma.service.http.json_document import JsonText, parsed_object
from gma.service.http.media import JSON

MOST_TEXTS = 200
"""Of a list: with a list of its own for each it is below the values that a body may have."""

MOST_PROBLEMS = 3
"""How many an answer tells of a request that is not valid."""


LONGEST_NAME = 256
"""Characters of a string that is no text."""


class Fields(BaseModel):
    """An object of a request. Members that it does not have are passed over."""

    model_config = ConfigDict(
        extra="ignore", strict=True, frozen=True, use_attribute_docstrings=True
    )

    @classmethod
    async def read(cls, body: Pieces) -> Self:
        """The request that comes in `body`. Raises ServiceError for what is wrong with it."""
        return cls.of(await parsed_object(body))

    @classmethod
    def of(cls, members: dict[str, Any]) -> Self:
        """The request with these members. Raises Validation."""
        try:
            return cls.model_validate(members)
        except Invalid as error:
            raise Validation(problems(error, most=MOST_PROBLEMS)) from None


class Inputs(NamedTuple):
    """The texts of a request."""

    texts: list[JsonText]
    listed: bool
    """Whether they came in a list, even if it has one alone."""


def _short(given: object) -> object:
    return given.whole() if isinstance(given, JsonText) else given


def _plain(given: object) -> object:
    """Numbers that are whole are integers in JSON, whatever their point."""
    return int(given) if isinstance(given, float) and given.is_integer() else given


def _inputs(given: object) -> Inputs:
    if isinstance(given, JsonText):
        return Inputs([given], listed=False)
    if not isinstance(given, list):
        raise ValueError("input should be a string, or a list of strings")
    if not given:
        raise ValueError("the list is empty: send at least one text")
    if len(given) > MOST_TEXTS:
        raise ValueError(f"a list has at most {MOST_TEXTS} texts, and this one {len(given)}")
    for n, each in enumerate(given):
        if not isinstance(each, JsonText):
            raise ValueError(f"input {n} of the list should be a string")
    return Inputs(given, listed=True)


TEXT_SCHEMA = {"type": "string", "minLength": 1}
TEXTS_SCHEMA = {"type": "array", "items": TEXT_SCHEMA, "minItems": 1, "maxItems": MOST_TEXTS}

Short = BeforeValidator(_short)
"""Makes a string of one that is no text."""

# What bounds a value comes before what makes it, or the OpenAPI page does not have it.
Name = Annotated[str, Field(max_length=LONGEST_NAME), Short]

Whole = BeforeValidator(_plain)
"""Makes an integer of a number that is one."""

Texts = Annotated[
    Inputs, PlainValidator(_inputs), WithJsonSchema({"anyOf": [TEXT_SCHEMA, TEXTS_SCHEMA]})
]
"""A text, or a list of texts."""


def body_of(request: type[Fields]) -> dict[str, Any]:
    """What the OpenAPI page says of a body that holds such a request."""
    schema = request.model_json_schema()
    inlined = _inlined(schema, schema.pop("$defs", {}))
    return {"required": True, "content": {JSON: {"schema": inlined}}}


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    """The schema with what it refers to in place: the page has no other for it."""
    if isinstance(schema, list):
        return [_inlined(each, definitions) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    return {name: _inlined(each, definitions) for name, each in schema.items()}
