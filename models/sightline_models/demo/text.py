"""The demo model's tokenizer and chat template, and conversations as the tokens it is trained on.

Knows text and tokens. Knows no pictures and no tensors.

Words are tokens of their own; digits and capital letters are split singly, so that what is read is read letter by
letter.
"""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from sightline_models.demo import scenes
from sightline_models.demo.questions import PAIR_TASKS, TASKS, Asker, Conversation

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
UNK, BOS, EOS, PAD, IMAGE = range(len(SPECIAL))
USER, ASSISTANT = "USER: ", " ASSISTANT:"

CHAT_TEMPLATE = """\
{%- for message in messages %}
{%- if message['role'] == 'user' %}{{ 'USER: ' }}
{%- elif message['role'] == 'assistant' %}{{ ' ASSISTANT:' }}{% endif %}
{%- if message['content'] is string %}{{ message['content'] }}
{%- else %}
{%- for part in message['content'] %}
{%- if part['type'] in ['image', 'image_url'] %}{{ '<image>\\n' }}{% endif %}
{%- endfor %}
{%- for part in message['content'] %}
{%- if part['type'] == 'text' %}{{ part['text'] }}{% endif %}
{%- endfor %}
{%- endif %}
{%- if message['role'] == 'assistant' %}{{ '</s>' }}{% elif message['role'] == 'system' %}{{ ' ' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}
"""

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "Answer the question about the picture.",
    "You answer questions about images.",
)


@dataclass(frozen=True)
class Segment:
    """A conversation after what all conversations about a picture begin with."""

    task: str
    tokens: list[int]
    answer: list[bool]
    """Whether each token is predicted: the answers' tokens and the ends of the answers."""
    last: list[bool]
    """Whether each token belongs to the last answer."""


class Codec:
    """Conversations as tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._user = self._id(USER)
        self._assistant = self._id(ASSISTANT)

    def _id(self, token: str) -> int:
        found = self.tokenizer.token_to_id(token)
        assert found is not None, token
        return found

    def ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def prefix(
        self, pictures: int, patches: int, system: str = "", before: Sequence[tuple[str, str]] = ()
    ) -> list[int]:
        """What comes before the first question about the pictures; ``before`` them there may have been turns."""
        start = self.ids(system + " ") if system else []
        for question, answer in before:
            start += [self._user, *self.ids(question), self._assistant, *self.ids(answer), EOS]
        return [BOS, *start, self._user, *([IMAGE] * patches + self.ids("\n")) * pictures]

    def segment(self, conversation: Conversation) -> Segment:
        tokens: list[int] = []
        answer: list[bool] = []
        last: list[bool] = []
        for index, (question, reply) in enumerate(conversation.turns):
            asked = [*([self._user] if index else []), *self.ids(question), self._assistant]
            told = [*self.ids(reply), EOS]
            final = index == len(conversation.turns) - 1
            tokens += asked + told
            answer += [False] * len(asked) + [True] * len(told)
            last += [False] * len(asked) + [final] * len(told)
        return Segment(conversation.task, tokens, answer, last)


def corpus(pictures: int = 3000) -> Iterable[str]:
    """Questions and answers of all kinds, in the trained wordings."""
    rng = random.Random("tokenizer")
    asker = Asker()
    before = None
    for _ in range(pictures):
        _, scene = scenes.draw(rng, scenes.Look(sides=(96, 96), effects=False, odd_items=0))
        conversations = [asker.ask(rng, task, scene) for task in TASKS[scene.kind]]
        if scene.things and before is not None:
            conversations += [asker.compare(rng, task, before, scene) for task in PAIR_TASKS]
        before = scene if scene.things else before
        for conversation in [*conversations, asker.chat(rng), asker.chat(rng)]:
            if conversation:
                for turn in conversation.turns:
                    yield from turn
    for _ in range(50):
        yield from SYSTEM_PROMPTS


def train_tokenizer(vocab_size: int = 1408) -> Tokenizer:
    """A byte-level BPE of the words that scenes are asked about with."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    words = Regex(r" ?[A-Z](?=[a-z])[a-z]+|[A-Z]|\d| ?[a-z]+|[^\sA-Za-z\d]+|\s")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_tokens([AddedToken(USER, normalized=False), AddedToken(ASSISTANT, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", BOS)]
    )
    assert tokenizer.get_vocab_size() <= vocab_size
    return tokenizer


def to_json(tokenizer: Tokenizer) -> str:
    return json.dumps(json.loads(tokenizer.to_str()), indent=1, ensure_ascii=False) + "\n"
