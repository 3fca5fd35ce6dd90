"""How each kind of question is worded: in ways that are trained, ways that are held out, and other people's ways.

Knows English. Knows no scenes and no answers.

A line is a sentence with choices, as "Count the [objects|shapes]." The first line with the first of each choice is the
plainest way to ask.
"""

import random
import re
from dataclasses import dataclass
from itertools import product
from typing import Literal

from sightline_models.demo.strangers import STRANGERS

Split = Literal["trained", "held out", "strangers"]

_CHOICE = re.compile(r"\[([^\]]*)\]")


@dataclass(frozen=True)
class Wordings:
    """The wordings of one kind of question."""

    trained: tuple[str, ...]
    """Lines, with their choices."""
    held_out: tuple[str, ...]
    """The same; no sentence of theirs is one of the trained."""
    strangers: tuple[str, ...] = ()
    """Sentences by somebody else, without those that are trained."""

    def draw(self, rng: random.Random, split: Split = "trained") -> str:
        """A sentence: a line, then one of each of its choices."""
        line = rng.choice({"trained": self.trained, "held out": self.held_out, "strangers": self.strangers}[split])
        return _CHOICE.sub(lambda choice: rng.choice(choice[1].split("|")), line)

    @property
    def plainest(self) -> str:
        return next(iter(sentences(self.trained[0])))


def sentences(line: str) -> list[str]:
    """All that a line can become."""
    parts = _CHOICE.split(line)
    parts_of = [part.split("|") if index % 2 else [part] for index, part in enumerate(parts)]
    return ["".join(chosen) for chosen in product(*parts_of)]


def plainly(sentence: str) -> str:
    """A sentence without what people type differently without noticing: capitals, and the sign it ends with."""
    return sentence.lower().rstrip(".?! ")


WORDINGS: dict[str, Wordings] = {}


def _words(task: str, trained: str, held_out: str) -> None:
    lines, others = (tuple(line.strip() for line in text.strip().splitlines()) for text in (trained, held_out))
    known = {plainly(sentence) for line in (*lines, *others) for sentence in sentences(line)}
    WORDINGS[task] = Wordings(lines, others, tuple(text for text in STRANGERS[task] if plainly(text) not in known))


# {a}, {b}: things, as "red circle". {kind}: things counted, as "red circles". {side}: "left of". {item}: a receipt's.
_words(
    "bg",
    """What color is the background?
    What[ is|'s] the [background color|background colour|color of the background|colour of the background]?
    Background [color|colour]?
    Tell me the [background color|color of the background|background's color].
    [On what|On which] [color|colour] is it drawn?
    [What|Which] [color|colour] is the [background|backdrop|ground][| here| in the picture| of this image]?
    [What|Which] color is it drawn on?
    [What|Which] [color|colour] is behind [it all|everything]?
    The background: [what|which] color is it?
    Which [color|colour] has the background?
    [Can you tell|Please tell] me the background color?""",
    """What colour does the background have?
    Name the color of the background.""",
)
_words(
    "color",
    """What color is the {a}?
    What[ is|'s] the [color|colour] of the {a}[| in the picture| in this image| here]?
    What colour is the {a}?
    [Color|Colour] of the {a}?
    Tell me the [color|colour] of the {a}.
    [Which|What] [color|colour] does the {a} have?
    The {a}: [which|what] [color|colour] is it?
    In [which|what] color is the {a}[| drawn| painted| shown]?
    [What|Which] [color|colour] is the {a} [in the picture|in this image|on the image|here|you see]?
    [Please tell|Can you tell|Could you tell] me [what color the {a} is|the color of the {a}]?
    What color has the {a}?
    What is the {a}'s [color|colour]?""",
    """Name the colour of the {a}.
    Can you say what color the {a} is?""",
)
_words(
    "shape",
    """What shape is the {a} object?
    [What|Which] shape is the {a} [thing|one|object]?
    [What|Which] shape is {a}?
    What[ is|'s] the {a} [thing|one|object|shape][| in the picture| here]?
    What[ is|'s] the shape of the {a} [object|thing|one]?
    Name the {a} [shape|object|thing|one].
    What [kind|sort] of [shape|thing] is the {a} [one|object|thing]?
    [Which|What] [shape|form] does the {a} [object|thing|one] have?
    Tell me [the shape of the {a} object|what the {a} one is|what the {a} thing is].
    [What|Which shape] is [drawn|painted|shown] in {a}?
    The {a} [object|thing|one]: what is it?
    [Can you tell|Please tell] me the shape of the {a} [object|thing]?""",
    """Tell me what shape the {a} thing is.
    The {a} one has what shape?""",
)
_words(
    "count",
    """How many objects are there?
    How many [objects|shapes|things] are there[| in the picture| in this image| in total| altogether]?
    How many [objects|shapes|things] [do you see|can you see|can you find|are shown|are visible|are drawn|are here]?
    How many [objects|shapes|things] are [in|on] [the|this] [picture|image]?
    Count the [objects|shapes|things][| in the image| in the picture| for me].
    [Number|The number] of [objects|shapes|things]?
    how many are there
    What is the [number of objects|number of shapes|total number of things]?
    Tell me [the number of objects|the number of shapes|how many shapes there are].
    [Can you|Please|Could you] count [the objects|the shapes|everything|all things].
    How many in [all|total]?""",
    """How many shapes does the picture show?
    Tell me how many objects you see.""",
)
_words(
    "countx",
    """How many {kind} are there?
    How many {kind} are there [in the picture|in this image|here|in total]?
    How many {kind} [do you see|can you see|can you find|are shown|are visible]?
    How many {kind} are [in|on] [the|this] [picture|image]?
    Count the {kind}[| in the picture| in the image| for me].
    [Number|The number] of {kind}?
    What is the number of {kind}?
    [Please count|Can you count|Could you count] [the|all] {kind}.
    Tell me the number of {kind}.
    How many [are there|do you see] of the {kind}?""",
    """Tell me how many {kind} there are.
    How many {kind} does the image contain?""",
)
_words(
    "where",
    """Where is the {a}?
    Where is the {a} [in the picture|in this image|located|placed|drawn|on the image|here]?
    Where's the {a}[| in the picture]?
    In which [part|area|region] of the [image|picture] is the {a}?
    In what [area|place|spot] of the [image|picture] is the {a}?
    What[ is|'s] the [position|place|location] of the {a}?
    Where can I [find|see|look for] the {a}?
    Tell me [where the {a} is|the position of the {a}|where to find the {a}].
    [Position|Place|Location] of the {a}?
    The {a}: where is it?
    Find the {a}: where is it?
    [Can you tell|Please tell|Could you tell] me where the {a} is?""",
    """Where do you see the {a}?
    In what part of the picture is the {a}?""",
)
_words(
    "leftmost",
    """Which object is {most}?
    Which [object|shape|thing|one] is {most}?
    What[ is|'s] the {most} [object|thing|shape|one][| in the picture| in this image| you see]?
    Which is the {most} [object|thing|shape|one]?
    Name the {most} [object|shape|thing].
    What is {most}?
    Tell me the {most} [object|thing|one].
    Of all [objects|shapes|things], which is {most}?
    [What|Which object|Which shape] [stands|sits|lies] {most}?
    [What|Which] [object|shape] do you see {most}?
    Find the {most} [object|shape|thing].
    [Can you name|Please name] the {most} [object|shape]?""",
    """Which thing is {most} here?
    Tell me the {most} shape.""",
)
_words(
    "exist",
    """Is there {a}?
    Is there {a} [in the picture|in this image|on the image|here|somewhere|to be seen]?
    [Do|Can] you see {a}[| in the picture| in the image| here| there| somewhere]?
    Does [the|this] [picture|image] [show|contain|have] {a}?
    Is {a} [there|in the picture|on the image|shown|visible|present|here]?
    [any|Any|Are there any|Do you see any|Can you see any] {bare}?
    [Can you find|Do you spot|Can you spot|Do you notice] {a}?
    Tell me [if|whether] there is {a}.
    Does {a} appear[| in the picture| here]?
    There is {a}, [right|isn't there|correct]?
    Is it true that there is {a}?
    Could there be {a} in it?""",
    """Is there {a} anywhere?
    Do you find {a} in this image?""",
)
_words(
    "rel",
    """Is the {a} {side} the {b}?
    Is the {a} {side} the {b}[ or not| in the picture| here]?
    Is the {a} [located|placed|drawn|somewhere|found] {side} the {b}?
    Would you say the {a} is {side} the {b}?
    Do you see the {a} {side} the {b}?
    [the|The] {a} is {side} the {b}, [right|isn't it|correct]?
    [Is it true|Is it right|Would you agree] that the {a} is {side} the {b}?
    Tell me [if|whether] the {a} is {side} the {b}.
    The {a} is {side} the {b}: yes or no?
    Looking at the picture, is the {a} {side} the {b}?
    Can I find the {a} {side} the {b}?""",
    """Does the {a} lie {side} the {b}?
    Can you tell if the {a} is {side} the {b}?""",
)
_words(
    "further",
    """Which is further {way}, the {a} or the {b}?
    Which [one|object|thing|of them] is further {way}[:|,] the {a} or the {b}?
    What is further {way}, the {a} or the {b}?
    Is the {a} or the {b} further {way}?
    [Which|Which one|What] [lies|stands|sits|is placed] further {way}[:|,] the {a} or the {b}?
    The {a} or the {b}: [which|which one|what] is further {way}?
    Between the {a} and the {b}, which [is|one is] further {way}?
    [Can you tell|Please tell] me what is further {way}: the {a} or the {b}?""",
    """Of the {a} and the {b}, which is further {way}?
    Tell me which is further {way}, the {a} or the {b}.""",
)
_words(
    "bigger",
    """Which is {more}, the {a} or the {b}?
    Which [one|object|thing|of them] is {more}[:|,] the {a} or the {b}?
    What is {more}, the {a} or the {b}?
    Is the {a} or the {b} {more}?
    The {a} or the {b}: [which|which one|what] is {more}?
    Between the {a} and the {b}, which [is|one is] {more}?
    [Which|What] looks {more}[:|,] the {a} or the {b}?
    [Can you tell|Please tell] me what is {more}: the {a} or the {b}?""",
    """Of the {a} and the {b}, which is {more}?
    Tell me which is {more}, the {a} or the {b}.""",
)
_words(
    "biggest",
    """Which object is the {most}?
    Which [object|shape|thing|one] is the {most}[| in the picture| here]?
    What[ is|'s] the {most} [object|thing|shape|one][| in the picture| in this image| you see]?
    Which is the {most} [object|thing|shape|one]?
    Name the {most} [object|thing|shape].
    Tell me the {most} [object|thing|one].
    Of all [objects|shapes|things], which is the {most}?
    Find the {most} [object|thing|shape].
    [Can you name|Please name] the {most} [object|shape]?""",
    """Which of them is the {most}?
    Tell me the {most} shape.""",
)
_words(
    "caption",
    """Describe the picture.
    Describe [the|this] [picture|image|photo|scene|drawing].
    [Caption|Explain] [the|this] [picture|image|photo|drawing].
    What[ is|'s] [in|on] [the|this] [picture|image|photo|drawing]?
    What do you see[| in the picture| in this image| on the picture| here| there]?
    [Write|Give|Give me|I need] a [caption|short caption|description|short description][| for it| of the image].
    Tell me [what you see|what is in the picture|what is shown|about this picture|what this is].
    What does [the|this] [picture|image|drawing|photo] [show|contain|look like]?
    [what|What] is this
    What['s| is] [this|that]?
    [Can you|Could you|Please] describe [the picture|this image|what you see|what is shown].
    What[ is|'s] [shown|drawn|there|visible|depicted][| here| in the picture| in this image]?
    What am I looking at?
    What can you [see|tell me about it|make out|tell me about the picture]?
    [Say|Explain] what [you see|is there|it shows|the picture shows].
    [Picture|Image] description[|, please].""",
    """What can be seen here?
    Please tell me what is on this picture.""",
)
_words(
    "list",
    """List the objects from left to right.
    [List|Name|Enumerate|Tell me|Give me|Say] [the|all|all the] [objects|shapes|things] from left to right.
    What are the [objects|shapes|things][,|] from left to right?
    [Which|What] [objects|shapes|things] [are there|do you see|can you see], from left to right?
    From left to right, [what are the objects|which shapes are there|which objects do you see|name the objects].
    Left to right: [what are the objects|which shapes are there|list the objects|name everything]?
    [List|Name] [everything|all you see|what you see], starting [at|from|on] the left.
    [List|Name] [the objects|the shapes|all objects|them all] in order, left to right.
    [Objects|Shapes|Things] from left to right?
    [Start|Begin] [at|on] the left and [list|name] [the objects|all shapes|everything].
    [Can you|Please|Could you] [list|name] [the objects|the shapes|everything] from left to right.""",
    """From left to right, what do you see?
    Go from left to right and name the shapes.""",
)
_words(
    "box",
    """Give the bounding box of the {a}.
    [Give me|Return|Find|Output|Print|Tell me|Get] the [bounding box|box] of the {a}[| as JSON| in JSON].
    Bounding box of the {a}?
    Where exactly is the {a}? Give a [bounding box|box].
    [Locate|Find|Mark|Detect] the {a} [with a bounding box|and give its bounding box|with a box].
    What[ is|'s] the [bounding box|box] [of|for|around] the {a}?
    Box [of|for|around] the {a}[|, please]?
    [Can you|Please|Could you] [give|return|find] [|me ]the bounding box of the {a}.
    [Coordinates|The coordinates|Bounding box coordinates] of the {a}?
    I want the [box|bounding box] of the {a}[| as JSON].
    Detect the {a} as JSON.""",
    """Show me the bounding box of the {a}.
    I need the box of the {a} as JSON.""",
)
_words(
    "detect",
    """Detect all objects as JSON.
    Detect [all|the|all the] [objects|shapes|things][| as JSON| in JSON| in the picture].
    [Give|Return|Output|Print|List] [the|all] [bounding boxes|boxes] of [all|the] [objects|shapes|things][| as JSON].
    [Locate|Find|Mark] all [objects|shapes|things] with [bounding boxes|boxes|their boxes].
    [List|Return|Give] all [objects|shapes|things] with their [bounding boxes|boxes|coordinates] as JSON.
    [Return|Give me|I want] all [bounding boxes|boxes] as JSON.
    What are the [bounding boxes|boxes] of [all objects|the shapes|everything]?
    Run object detection[| and give JSON| on this picture].
    Find [all objects|everything|all shapes] and [give|return] [their|the|all] [boxes|bounding boxes].
    Where is everything? Give [boxes|bounding boxes|JSON].
    For [each|every] [object|shape|thing], give [the|its] [label and bounding box|bounding box|box].
    [Can you|Please|Could you] [detect|locate|find and box] [all objects|every shape|everything].""",
    """Find every object and give its bounding box.
    Give me the boxes of all shapes.""",
)
_words(
    "ink",
    """What color is the text?
    What[ is|'s] the [color|colour] of the [text|writing|ink|{what}]?
    [What|Which] [color|colour] is the [writing|ink|print|{what}]?
    In [which|what] [color|colour] is it [written|printed]?
    [Text|Ink|Font] [color|colour]?
    [What|Which] color is it [written|printed] in?
    Tell me the color of the [text|writing|{what}].
    What color has the [text|writing|{what}]?
    [Which|What] color [is used|was used] for the [text|writing|{what}]?
    [Can you tell|Please tell] me the color of the [text|writing|{what}]?""",
    """Which color does the text have?
    Name the colour of the writing.""",
)
_words(
    "read_number",
    """Read the number.
    Read the number [in the picture|for me|you see|on the image].
    [What|Which] number is [shown|written|this|that|printed|there|in the picture|on the image]?
    [What|Which] number [do|can] you [see|read]?
    What[ is|'s] the number[| in the picture| shown| here]?
    What does it [say|read]?
    Read the text.
    What[ is|'s] [written|printed][| here| there| in the picture| on it]?
    Read [it|this|it out|what it says|what is written].
    [Can you|Please|Could you] read [the number|this number|it|the text].
    Transcribe the [number|text].
    Which [digits|figures] do you [see|read]?""",
    """Tell me the number you see.
    Which number is written there?""",
)
_words(
    "read_numbers",
    """Read the numbers.
    Read [all|the|both] numbers [in the picture|for me|you see|on the image].
    [What|Which] numbers are [shown|written|these|printed|there|in the picture|on the image]?
    [What|Which] numbers [do|can] you [see|read]?
    What are the numbers[| in the picture| shown| here]?
    What does it [say|read]?
    Read the text.
    What[ is|'s] [written|printed][| here| there| in the picture| on it]?
    Read [all numbers|it|this|it out|what it says|what is written].
    [Can you|Please|Could you] read [the numbers|these numbers|it|the text].
    [Transcribe|List] the numbers.""",
    """Tell me the numbers you see.
    Which numbers are written there?""",
)
_words(
    "read_word",
    """Read the word.
    Read the word [in the picture|for me|you see|on the image].
    [What|Which] word is [shown|written|this|that|printed|there|in the picture|on the image]?
    [What|Which] word [do|can] you [see|read]?
    What[ is|'s] the word[| in the picture| shown| here]?
    What does [it|the sign|the text|the picture] [say|read]?
    Read the [text|sign|letters].
    What[ is|'s] [written|printed][| here| there| in the picture| on it]?
    Read [it|this|it out|what it says|what is written].
    [Can you|Please|Could you] read [the word|this word|it|the text].
    Transcribe the [word|text].
    Which letters do you [see|read]?""",
    """Tell me the word you see.
    Which word is written there?""",
)
_words(
    "read_receipt",
    """Read the receipt.
    Read [the receipt|the bill|this bill] [for me|aloud|line by line].
    What does the [receipt|bill] say?
    Read the text[| on it| in the picture].
    Transcribe [the receipt|this receipt|the text|it].
    Read [all|the|all the] [lines|rows|items|entries].
    What does it [say|read]?
    What[ is|'s] [written|printed][| here| there| on the receipt| on it]?
    List the [items|lines] [and prices|and their prices|with their prices].
    [Can you|Please|Could you] [read|transcribe] [the receipt|this receipt|the bill].
    Give me the [text|lines] of the receipt.
    Read [it|this|it out|what it says|what is written].""",
    """Write down what the receipt says.
    Read me this receipt.""",
)
_words(
    "item",
    """How much is the {item}?
    How much does the {item} cost?
    [Price|Cost|The price] of [|the ]{item}?
    What[ is|'s] the [price|cost] of the {item}[| on the receipt| here]?
    What does the {item} cost?
    How much [for|was|was paid for|do I pay for|did I pay for] the {item}?
    What [do|did] I pay for the {item}?
    [Read|Find|Look up|Give me] the price of the {item}.
    The {item}: how much[| is it| does it cost]?
    The {item} [costs|is] how much?
    {item} price?
    [Can you tell|Please tell|Could you tell] me the price of the {item}?""",
    """Tell me the price of the {item}.
    What did the {item} cost?""",
)
_words(
    "total",
    """What is the total?
    What[ is|'s] the [total|total amount|total price|amount due][| of the receipt| on the receipt| here]?
    How much is [the total|it in total|it altogether|everything together|all of it]?
    Total?
    [Read|Find|Give me] the [total|total amount].
    What does [it|all of it|everything] cost[ in total| together| altogether]?
    How much [is due|do I owe|was spent|did it cost in total]?
    [Total|Sum] of the receipt?
    What do I [owe|have to pay]?
    [Can you tell|Please tell] me the total?""",
    """Tell me the total.
    How much do I have to pay in total?""",
)
_words(
    "sum",
    """Add the numbers.
    What[ is|'s] the [sum|total][| of the numbers| of these numbers| of these| here]?
    Add [the|these|all] numbers [up|together].
    [Add|Sum] [them up|it up|everything up|them].
    What do [the numbers|these numbers|they] [add up|sum|come] to?
    [Sum|The sum|Total] of [the|these|all] numbers?
    [Calculate|Compute|Give me|Find|Work out] the [sum|total][| of the numbers].
    How much is it [together|in total|altogether|all together]?
    What is the result of adding [them|the numbers|these numbers]?
    [Can you|Please|Could you] [add|sum] [the|these|all] numbers.
    What [do|would] I get when I add [them|the numbers]?""",
    """Tell me the sum of these numbers.
    Please add these up.""",
)
_words(
    "cmp_color",
    """What color is the {shape} in the {which} {image}?
    What[ is|'s] the [color|colour] of the {shape} [in|on] the {which} {image}?
    [In|On] the {which} {image}, [what|which] color is the {shape}?
    [What|Which] [color|colour] is the {shape} [in|on|of] the {which} {image}?
    [What|Which] color does the {shape} [in|on] the {which} {image} have?
    In the {which} {image}: [color|colour] of the {shape}?
    [Can you tell|Please tell] me what color the {shape} in the {which} {image} is?""",
    """Tell me the color of the {shape} in the {which} {image}.
    The {which} {image}: what color is the {shape}?""",
)
_words(
    "cmp_count",
    """How many objects are in the {which} {image}?
    How many [objects|shapes|things] are [in|on] the {which} {image}?
    How many [objects|shapes|things] [do you see|can you see] [in|on] the {which} {image}?
    [In|On] the {which} {image}, how many [objects|shapes|things] are there?
    Count the [objects|shapes|things] [in|on] the {which} {image}.
    [What is the number|Number] of [objects|shapes] in the {which} {image}?
    [Can you|Please] count the [objects|shapes] in the {which} {image}.""",
    """How many objects does the {which} {image} show?
    Tell me how many objects are in the {which} {image}.""",
)
_words(
    "cmp_more",
    """Which {image} has {more} objects?
    Which {image} [shows|contains|has] {more} [objects|shapes|things]?
    [In|On] which {image} are there {more} [objects|shapes|things]?
    [In|On] which {image} do you see {more} [objects|shapes|things]?
    Which [one|of them] has {more} [objects|shapes|things]?
    Which has {more} [objects|shapes|things], the first or the second {image}?
    Is it the first or the second {image} that has {more} [objects|shapes|things]?""",
    """Which of the two has {more} objects?
    Tell me which {image} contains {more} objects.""",
)
_words(
    "cmp_which",
    """Which {image} has {a}?
    Which {image} [has|contains|shows] {a}?
    [In|On] which {image} [is there|do you see|can you see|can I find|is] {a}?
    Where is {a}, in the first or the second {image}?
    Which [one|of them] [has|shows|contains] {a}?
    Is {a} in the first or the second {image}?
    [Find|Look for] {a}: which {image} is it in?""",
    """Tell me which {image} has {a}.
    {a_cap} is in which {image}?""",
)
_words(
    "cmp_describe",
    """Compare the two {image}s.
    [Compare|Describe] [the|both|these] {image}s.
    Describe the two {image}s.
    What is the difference[| between the two {image}s| between these {image}s| between them]?
    What do you see[| in the {image}s| in each {image}| on both {image}s]?
    What [is|do you see] [in|on] [both|these|the] {image}s?
    [How|In what way] are the [|two ]{image}s different?
    [Can you|Please|Could you] [compare|describe] [the two|both|these] {image}s.
    [Say|Tell me|List] what [each {image} shows|both {image}s show|is in each {image}].
    [What do|What does each of] the {image}s show?""",
    """How do the {image}s differ?
    Tell me what is on each {image}.""",
)
_words(
    "fu_where",
    """Where is it?
    Where is it [in the picture|located|placed|on the image]?
    And where is it[| in the picture]?
    [Where|And where] can I [find|see] it?
    [In which|And in which] [part|area] of the [picture|image] is it?
    [And its|Its|What is its|What's its] [position|place|location]?
    Tell me where it is.
    [And where|Where] exactly?
    [Can you tell|Please tell] me where it is?""",
    """Where do you see it?
    In what part of the picture is it?""",
)
_words(
    "fu_box",
    """Give its bounding box.
    [And its|Its|What is its|And what is its|What's its] [bounding box|box]?
    [Now give|Give me|Return|Output|Print] its [bounding box|box][| as JSON| too].
    [Bounding box|Box][?|, please.]
    [And the|The] [bounding box|box][| of it]?
    What are its coordinates?
    [Locate|Mark] it with a [bounding box|box].
    [Can you|Please|Could you] [give|return] its [bounding box|box].""",
    """Show me its bounding box.
    I need its box.""",
)
_words(
    "fu_color",
    """What color is it?
    [What|Which] [color|colour] is it[| painted| drawn in| in the picture]?
    And [what|which] [color|colour] is it?
    [What|Which] color does it have?
    [And its|Its|What's its|And what is its] [color|colour]?
    In [what|which] color is it[| drawn| painted]?
    And the [color|colour]?
    Do you know its color?
    [Can you tell|Please tell] me its color?""",
    """Tell me its color.
    What is its colour?""",
)
_words(
    "fu_shape",
    """And what shape is {a}?
    And the {a} [one|object|thing|shape]?
    [What|How] about the {a} [object|one|thing]?
    And [which|what] [shape|object|thing] is {a}?
    [What|And what] is the {a} [one|object|thing]?
    [And what|What] shape is the {a} [one|object|thing]?
    And {a}?
    What about {a}?
    Then what [is|shape is] the {a} [one|object]?""",
    """Now the {a} one, please.
    What shape is {a}, then?""",
)
_words(
    "fu_count",
    """How many of them are there?
    [How|And how] many of [them|those] are there?
    And how many are there?
    [How|And how] many of [those|them] [do|can] you see?
    And how many {kind}[| are there| do you see]?
    [Count them|Count those|And count them|Please count them].
    How many {kind} [are there|in total|altogether]?
    [And their|Their|What is their] number?
    [How|And how] many?
    [So|Then] how many [are there|of them are there]?""",
    """How many of these are there?
    Now count the {kind}.""",
)
_words(
    "fu_list",
    """List them.
    List them [all|please|for me|one by one].
    Which ones[| are they| do you see]?
    [What|Which|And what|And which] are they?
    Name them[| all| please| for me].
    [Name|List] [each|all|every one] of them.
    What are [these|those][| objects| shapes]?
    [Say|Tell me|Please say] what they are.
    [And|So] [what|which] [shapes|objects] are they?
    [Could|Would] you [list|name] them?""",
    """Tell me which.
    Can you list them?""",
)
_words(
    "fu_item",
    """And the {item}?
    And for the {item}?
    And how much [is|was] the {item}?
    [What|How] about the {item}?
    How much was the {item}?
    And the price of the {item}?
    And [what|how much] does the {item} cost?
    [And what|What] [is|was] the price of the {item}?
    And {item}?
    Then [how much is|what about] the {item}?""",
    """And what did the {item} cost?
    Now the {item}, please.""",
)
_words(
    "hello",
    """Hello
    Hello[!|.| :)|, computer| again]
    Hi[|!| there| there!|, you| again]
    Hey[|!| there| you]
    Good [morning|day|afternoon][|!]
    [Greetings|Howdy|Hallo|Welcome][|!]
    Hello, [anyone there|is anybody there|are you there]?
    [Hi|Hello], [nice to meet you|good to see you]""",
    """Hello there
    Good evening""",
)
_words(
    "thanks",
    """Thanks
    Thanks[!|.| a lot| so much| again| for that]
    Thank you[|!|.| so much| a lot| for your help]
    thanks[| a lot]
    [Great|Perfect|Nice|Cool|OK|Good|Wonderful], [thanks|thank you][|!]
    [That helps|Well done|That is right], [thanks|thank you]
    Much appreciated[|!]""",
    """Many thanks
    Thank you very much""",
)
_words(
    "who",
    """Who are you?
    [What|Who] are you[| exactly| really]?
    [Which|What] model are you?
    Are you [a human|a robot|a person|an AI|a machine|real]?
    What[ is|'s] your name?
    [Who|What] am I talking to?
    [What|Which] AI [is this|are you]?
    [Introduce|Describe] yourself.
    Tell me [about yourself|your name|what you are].
    Do you have a name?""",
    """Tell me who you are.
    What model is this?""",
)
_words(
    "help",
    """What can you do?
    What can you do [for me|exactly|here]?
    Help[|!| me| please]
    What can I [ask|ask you|do here|do with you|use you for]?
    How can you help[| me]?
    What are you [good at|able to do|good for|made for]?
    What are your [skills|abilities|limits]?
    How does this work?
    [Show|Tell] me what you can do.
    What [kind of|sort of|kinds of] questions can I ask[| you]?
    How do I use [this|you]?""",
    """What do you know?
    What questions can you answer?""",
)
_words(
    "how",
    """How are you?
    How are you [doing|today|feeling|doing today]?
    How is it going?
    How [are things|is everything|is life][| going]?
    How do you feel[| today]?
    What's up?
    Are you [OK|okay|fine|good|all right]?
    How's it going?
    How have you been?""",
    """Are you well?
    How do you do?""",
)
_words(
    "text_sum",
    """What is {sum}?
    {sum}=
    {sum}
    {sum} = ?
    {sum}?
    What's {sum}?
    [Calculate|Compute|Work out|Please calculate] {sum}[|.]
    [What|How much] does {sum} make?
    {sum} is [what|how much]?
    [Can you add|Please add|Sum up] {sum}[|.]
    What do you get for {sum}?
    [The sum|Sum|Result] of {sum}?""",
    """How much is {sum}?
    Add {sum}.
    {sum} makes?""",
)
