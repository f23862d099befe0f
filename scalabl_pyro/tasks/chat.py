"""Chat templates: the text that a template writes before the answer to a question."""

import json
import logging
import re
from collections.abc import Mapping
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from .._errors import nearest

logger = logging.getLogger(__name__)

#: Stands for the answer while a template is rendered.
ANSWER = "ANSWERofTHEassistant"
#: Arguments of ``apply_chat_template`` that the task sets itself, or that act on tokens.
RESERVED = (
    "conversation",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "sanitize_control_tokens",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
)
#: Names under which templates read whether the assistant writes its thoughts first.
THINKING = ("enable_thinking", "thinking")


class ChatTemplate:
    """A chat template with its options.

    Args:
        tokenizer: Tokenizer with a chat template.
        options: Options of ``apply_chat_template``, such as ``{"enable_thinking": False}``.

    Raises:
        ValueError: The template does not read an option.

    Example:
        >>> from scalabl_pyro.tasks.chat import ChatTemplate
        >>> tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}.{% endfor %}"
        >>> ChatTemplate(tokenizer, {}).render([{"role": "user", "content": "the sky"}])
        'the sky.'
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> None:
        self.tokenizer: Any = tokenizer
        self.options = dict(options)
        names = {name: self.options.get(name) for name in ("chat_template", "tools")}
        self.text = str(self.tokenizer.get_chat_template(**names))
        self._check_options()

    def render(self, messages: list[dict[str, Any]], **given: Any) -> str:
        """Return the text of a conversation.

        Raises:
            TemplateError: The template refuses it.
        """
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **given, **self.options))

    def warn_of_date(self) -> None:
        """Log a warning if the template writes the date of today."""
        if "strftime_now" in self.text and "date_string" not in self.options:
            remedy = (
                "pass chat_options={'date_string': '26 Jul 2024'}"
                if "date_string" in self.text
                else "write a fixed date into tokenizer.chat_template"
            )
            logger.warning(
                "The chat template writes the date of today, so prompts and predictions change from day to day: %s.",
                remedy,
            )

    def _check_options(self) -> None:
        read = set(re.findall(r"\w+", self.text)) | {"chat_template"}
        for name in self.options:
            if name in RESERVED:
                raise ValueError(f"chat_options: the task sets {name!r} itself. Leave it out.")
            if name not in read:
                switches = [known for known in THINKING if known in read]
                hint = nearest(name, switches) if switches else "Leave it out."
                raise ValueError(f"chat_options: the chat template does not read {name!r}. {hint}")


class ChatPrompt:
    r"""Text that a chat template writes before the answer of the assistant.

    The template renders question and answer together, as in the training of a chat model. The prompt is all that stands
    before the answer. It may be longer than the template's generation prompt: some templates have no generation prompt,
    and some write an empty thought before an answer.

    Args:
        tokenizer: Tokenizer with a chat template.
        options: Options of ``apply_chat_template``, such as ``{"enable_thinking": False}``.

    Raises:
        ValueError: The template does not read an option, leaves out the question or the answer, or has a generation
            prompt after which an answer does not follow.

    Example:
        >>> from scalabl_pyro.tasks.chat import ChatPrompt
        >>> tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        >>> ChatPrompt(tokenizer, {})("What color is the sky?")
        'user: What color is the sky?\nassistant: '
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> None:
        self.tokenizer: Any = tokenizer
        self.template = ChatTemplate(tokenizer, options)
        self._check_beginning("?")
        self.template.warn_of_date()

    def __call__(self, text: str) -> str:
        """Return the text before the answer.

        Args:
            text: Message of the user.

        Raises:
            ValueError: The template refuses the message, or leaves it out.
        """
        return self.around(text)[0]

    def around(self, text: str) -> tuple[str, str]:
        """Return the texts before and after the answer."""
        rendered = self._render([_user(text), {"role": "assistant", "content": ANSWER}])
        prompt, found, after = rendered.rpartition(ANSWER)
        if not found:
            raise ValueError(
                "The chat template leaves out the answer of the assistant, so the label's token cannot be found. Use "
                "chat=False, or set tokenizer.chat_template."
            )
        if text.strip() not in prompt:
            raise ValueError(
                "The chat template leaves out the text of the question, or changes it. Use chat=False, or set "
                "tokenizer.chat_template."
            )
        return prompt, after

    def _render(self, messages: list[dict[str, str]], **given: Any) -> str:
        try:
            return self.template.render(messages, **given)
        except TemplateError as error:
            raise ValueError(
                f"The chat template refuses a question with an answer: {error}. Use chat=False, or set "
                "tokenizer.chat_template."
            ) from error

    def _check_beginning(self, text: str) -> None:
        """Check that the generation prompt contains nothing that the answer does not follow, such as a thought."""
        asked = self._render([_user(text)], add_generation_prompt=True)
        prompt = self(text)
        pairs = list(zip(asked, prompt, strict=False))
        same = next((i for i, (one, other) in enumerate(pairs) if one != other), len(pairs))
        beginning = asked[same:].removesuffix(self.tokenizer.eos_token or "").strip()
        if beginning:
            switch = next((name for name in THINKING if re.search(rf"\b{name}\b", self.template.text)), None)
            hint = f"chat_options={{{switch!r}: False}} or " if switch and switch not in self.template.options else ""
            raise ValueError(
                f"The generation prompt of the chat template ends with {beginning!r}, which the template does not "
                f"write before an answer. The LLM would write other text first, such as its thoughts. Use {hint}"
                "chat=False, or set tokenizer.chat_template."
            )
        if added := prompt[same:].strip():
            logger.info("The chat template writes %r before an answer, and so the prompt ends with it.", added)


def check_chat_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a copy of options for a chat template, as JSON restores them.

    Args:
        options: Options by name, or None for no options.

    Raises:
        TypeError: The options are not a dict.
        ValueError: JSON cannot store a value, so a posterior could not be saved with it.

    Example:
        >>> from scalabl_pyro.tasks.chat import check_chat_options
        >>> check_chat_options({"enable_thinking": False})
        {'enable_thinking': False}
    """
    if options is None:
        return {}
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        raise TypeError(f"chat_options={options!r} must be a dict, such as {{'enable_thinking': False}}.")
    try:
        copied: dict[str, Any] = json.loads(json.dumps(dict(options), allow_nan=False))
    except (TypeError, ValueError):
        raise ValueError(
            f"chat_options={options!r}: JSON cannot store a value. Allowed are texts, numbers, booleans, None, and "
            "lists and dicts of them."
        ) from None
    return copied


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}
