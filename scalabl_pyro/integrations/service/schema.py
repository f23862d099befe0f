"""What ``/openapi.json`` says of a request."""

from typing import Any

from .calls import Call

#: Kind of each optional field.
KINDS = {
    **dict.fromkeys(("max_new_tokens", "num_samples", "top_k"), "integer"),
    **dict.fromkeys(("temperature", "top_p"), "number"),
    **dict.fromkeys(("tokens", "do_sample"), "boolean"),
    "decode": "string",
}


def request_schema(call: Call) -> dict[str, Any]:
    """Describe the requests of a call.

    Args:
        call: The call.

    Returns:
        Fields of an operation in the sense of OpenAPI.
    """
    first, *others = call.fields
    fields = ", ".join(call.posterior.task.row_fields)
    item: dict[str, Any] = {"type": "object"} if first == "rows" else {}
    items = {"type": "array", "minItems": 1, "maxItems": call.limits.max_rows, "items": item}
    if fields:
        items["description"] = f"Fields of a row: {fields}. In /predict, the answer may be missing."
    properties = {first: items} | {name: {"type": KINDS[name]} for name in others}
    schema = {"type": "object", "required": [first], "properties": properties, "additionalProperties": False}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
