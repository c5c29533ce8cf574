"""The plots of the built-in stories, from a lost toy to a seed that needs patience. `sample.py` explains the notation.

The text of a plot is a row of beats with an empty line between them. Each line of a beat is one way to tell it, and
fits every way to tell the others; `-` leaves the beat out, and a line that is indented goes on with the one above. The
first beat begins with {When}, and its hero is {who}: a name, a pronoun, or someone new to the reader.
"""

import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Plot:
    """What happens in a story, in order."""

    name: str
    """For people and tests; it does not appear in the text."""

    text: str
    """The beats, as the module docstring says."""

    choices: Mapping[str, tuple[str, ...] | tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    """Fields of this plot with their possible values; fields that depend on each other are chosen together."""

    hero: Literal["any", "child", "animal"] = "any"
    """Who may be the hero."""

    kinds: tuple[str, ...] = ()
    """Which animals may be the hero; empty for any."""

    apart: bool = False
    """Whether the friend lives in another house, and so is no brother or sister."""

    places: tuple[str, ...] = ()
    """Where it may happen; empty for anywhere."""

    days: tuple[str, ...] = ()
    """What the day may be like; empty for any."""

    @cached_property
    def beats(self) -> tuple[tuple[str, ...], ...]:
        """For each beat the ways to tell it; an empty way leaves it out."""
        lines = re.sub(r"\n +(?=\S)", " ", textwrap.dedent(self.text).strip())
        return tuple(tuple(way.removeprefix("-") for way in beat.split("\n")) for beat in lines.split("\n\n"))


# fmt: off
# What follows is a text to read and not code: with every word on a line of its own, it would be twice as long.

TOYS = (
    "a #color ball", "a #color toy car/car", "a soft toy bear/bear", "a #color toy boat/boat", "a #color hat",
    "a #color scarf", "a #size doll", "a shiny button", "a wooden horse", "a #color ribbon", "a #size drum",
    "a #color train", "a #color basket", "a shiny coin", "a #color book", "some #color mittens", "some #color blocks",
    "some shiny marbles", "some #color boots", "some #color crayons",
)
SNACKS = (
    "a #size cookie", "a #color apple", "a sweet pear", "a #size cake", "a warm muffin", "a #size sandwich",
    "a big cheese roll/roll", "some sweet berries", "some ripe cherries", "some warm pancakes", "some red grapes",
    "some crunchy carrots",
)
GIFTS = (
    "a #color scarf", "a card with a #color heart/card", "a #size cake", "a necklace of #color beads/necklace",
    "a picture of a #color horse/picture", "a #color paper flower/flower", "a #color hat", "a #size birdhouse",
    "a wooden boat", "a warm #color blanket", "some #color flowers", "some sweet cookies", "some #color socks",
)
MORNING = ("One day", "One morning", "One {day} morning", "On Saturday", "On Sunday", "Early one {day} morning")
ABROAD = ("the park", "the beach", "the forest", "the farm", "the pond", "the meadow")

LOST = Plot(
    name="a lost thing is found",
    choices={
        "thing": TOYS,
        "giver": ("{A.his} {G.role}", "{A.his} aunt", "{A.his} uncle", "{A.his} best friend"),
    },
    text="""
    {When}, {who} took {A.his} {thing.own} {place.to}.
    {When}, {who} went {place.to} with {A.his} {thing.own}.
    {When}, {who} was {place.at} with {A.his} {thing.own}.
    {When}, {who} walked {place.to}. {A.He} had {A.his} {thing.own} with {A.him}.

    -
    {thing.They} {thing.was} a gift from {giver}.
    {A} loved {thing.it} [very much|so much|more than anything].
    There was nothing else like {thing.it} in the whole town, and {A} was proud.
    {A} even slept with {thing.it} at night.
    {A.He} took {thing.it} everywhere.
    {thing.They} had been a gift from {giver}, and {A} loved {thing.it}.

    {A.He} ran and jumped and played [all morning|for a long time].
    {A} found [a snail|a feather|a big leaf] and looked at it for a long time.
    {A} made up a game and played it #number times.
    {A} [played|ran around|hopped and danced] [until {A.he} was tired|for a long time]. #look_around
    #look_around Then {A} [played|ran around] for a long time.
    #look_around {A} sat down on the {place.ground} for a while. Then {A.he} ran on.

    But when it was time to go home, {A} could not find {A.his} {thing.short}.
    After a while, {A} looked around. The {thing.short} {thing.was} gone!
    Then {A} stopped. Where {thing.was} {A.his} {thing.short}?
    Then it began to get late. {A} wanted to take {A.his} {thing.short}, but {thing.they} {thing.was} not there.
    Suddenly, {A} saw that {A.his} {thing.short} {thing.was} gone.

    <A cries: Oh no! My {thing.short} {thing.is} gone!>
    <A sadly: Where {thing.is} my {thing.short}? I cannot find {thing.it}.>
    {A} felt #sad. {A.He} began to cry.
    {A} looked everywhere, twice. <a sadly: {thing.They} {thing.was} here this morning!>
    {A.His} eyes filled with tears. <a sadly: I have lost my {thing.own}.>

    {A.He} looked {place.spot}. The {thing.short} {thing.was} not there.
    First, {A.he} looked {place.spot}. Then {A.he} looked {place.spot2}. [Nothing!|There was nothing.|No
        {thing.short}!]
    {A.He} looked {place.spot}, but there was only [a leaf|a stone|an old shoe|a snail].
    {A.He} looked {place.spot} and {place.spot2}, but {A.he} could not find {thing.it}.

    #came_by #whats_wrong <A sadly: I lost my {thing.own}.>
    #came_by #whats_wrong <A answers: I cannot find my {thing.short}. I have looked everywhere!>
    #came_by <B asks: What are you looking for?> <A answers: My {thing.own}. I had {thing.it} this morning.>

    <B says: Do not [cry|be sad]. I will help you.> They looked together.
    <B kindly: Let us look together. Four eyes see more than two.>
    {B} wanted to help. <b says: Come, we will find {thing.it}.>
    <B says: Think, {A}. Where did you have {thing.it} last?> {A} showed {B} the way.
    {B} nodded. <b says: I am good at finding things. Follow me!>
    <B asks: Where did you play?> {A} thought about it. Then they went back and looked again.

    They looked {place.spot3}. There {thing.they} {thing.was}!
    {B} looked {place.spot3}. <b cries: Come here! I found your {thing.short}!>
    Then {A} saw something {place.spot3}. <A cries: There {thing.they} {thing.is}! I see my {thing.own}!>
    At last, they found the {thing.own} {place.spot3}.
    They were about to give up. But then {B} looked {place.spot3}, and there {thing.they} {thing.was}!
    <A asks: Did we look {place.spot3}?> They ran there, and there {thing.was} the {thing.short}!

    #thanks
    {A} picked up {A.his} {thing.short} and [danced|laughed|jumped for joy]. #thanks
    {A} held the {thing.short} close. #thanks

    #until_dark
    After that, {A} always kept {A.his} {thing.short} [close|in a safe place].
    <A says: Next time, I will take better care of {thing.it}.>
    {A} let {B} play with the {thing.short}, too. #until_dark

    -
    #glad_end
    {A} learned that it is good to have a friend who helps.
    A good friend helps you look.
    """,
)

TOO_HIGH = Plot(
    name="something too high",
    places=("the park", "the garden", "the farm", "the meadow", "the yard"),
    choices={
        "thing, start": (
            ("a #color kite", "The wind took the kite up, and it got stuck in a tall tree."),
            ("a #color balloon", "{A} let go of the string, and the balloon flew up into a tree."),
            ("a #color ball", "{A} threw the ball so high that it landed on the roof of the shed."),
            ("a #color paper plane/plane", "The plane flew up, up, up, and landed on a high branch."),
            ("a #color hat", "The wind took the hat, and it landed at the top of a tree."),
            ("a #color scarf", "The wind blew the scarf away, and it hung on a high branch."),
        ),
        "tool, reach": (
            ("a long stick", "lifted the stick and pushed the {thing.short}"),
            ("a tall ladder", "climbed up the ladder and took the {thing.short}"),
            ("a #color broom", "held up the broom and pushed the {thing.short}"),
            ("a big box", "stood on the box and reached for the {thing.short}"),
            ("an old rake", "held up the rake and pulled at the {thing.short}"),
        ),
    },
    text="""
    {When}, {who} went {place.to} with {thing}.
    {When}, {who} was {place.at}. {A.He} had {thing}.
    {When}, {who} got {thing} from {A.his} {G.role} and took it {place.to}.
    {When}, {who} was {place.at} with {A.his} {G.role} and {thing}.

    -
    -
    #look_around
    {A} was #happy.
    It was a lot of fun.

    {start}
    But then something happened. {start}
    Suddenly, [there was trouble|something went wrong]. {start}

    <A cries: Oh no! My {thing.short} is too high!>
    <A sadly: My {thing.short} is up there. I want it back.>
    {A} looked up at the {thing.short}. It was [very|so|much too] high.
    {A} was #sad. The {thing.short} was far away now.
    <A asks: How can I get my {thing.short} back?>
    The {thing.short} looked very small up there.

    {A.He} jumped and jumped, but {A.he} could not reach it.
    {A.He} stood on {A.his} toes. {A.He} [jumped as high as {A.he} could|stretched and stretched]. It was no use.
    {A.He} tried to [climb up|jump], but {A.he} was too [small|little|short].
    {A.He} shook and shook {A.his} head. What could {A.he} do?

    #came_by #whats_wrong <A sadly: My {thing.short} is stuck, and I am too [small|short].>
    #came_by <B asks: Why do you look up like that?> <A answers: My {thing.short} is up there, and I cannot get it.>
    {A} called {A.his} {B.tie} {B.full}. <A says: Please help me! I cannot reach my {thing.short}.>

    {B} tried, too, but {B.he} was too short. <b says: We must think of something.>
    {B} sat down to think. <b happily: I have an idea!>
    They both jumped, but the {thing.short} was still too high. Then {B} had an idea.
    {B} scratched {B.his} head. <b says: We cannot fly. But we can be clever.>
    <B asks: What if we make your arm longer?>
    <B says: Wait here. I know what to do.>

    {B} ran to {A.his} {G.role} and asked for {tool}.
    {B} went away and came back with {tool}.
    {B} found {tool} {place.spot}.
    Together, they asked {A.his} {G.role} for {tool}.

    {G} came, too. {G.He} {reach}. [Down it came!|It worked!]
    Then {A.his} {G.role} came to help and {reach}. The {thing.short} came down!
    {G} {reach}. Slowly, the {thing.short} came loose. <A cries: We got it!>

    {A} picked up the {thing.short} and [hugged|kissed] it.
    <A happily: Thank you, {B}! Thank you, {G}!>
    <A happily: My {thing.short} is back! Thank you!>
    {A} had {A.his} {thing.short} again. #thanks
    {A} looked at the {thing.short} from all sides. It was not broken.

    {A} and {B} played with the {thing.short} until #sunset.
    #until_dark
    Then {A} and {B} took turns with the {thing.short}.
    From then on, {A} held {A.his} {thing.short} very tight.

    -
    #glad_end
    {A} learned that you can ask for help when something is too hard.
    It is good to think and to work together.
    """,
)

SHARING = Plot(
    name="sharing",
    choices={
        "snack": SNACKS,
        "lent": ("toys", "#color ball", "crayons", "swing", "best book", "#color kite"),
    },
    text="""
    {When}, {who} got {snack} from {A.his} {G.role}.
    {When}, {who} sat {place.at} with {snack}.
    {When}, {who} went {place.to}. {A.He} had {snack} in {A.his} bag.
    {When}, {who} helped {A.his} {G.role} in the kitchen. Then {A.he} got {snack}, all for {A.self}.

    The {snack.short} smelled so good! {A} could not wait to eat.
    <A thinks: This will taste so good!>
    {A} was [hungry|very hungry]. {A.He} looked at the {snack.short} and smiled.
    {snack.They} looked so [good|nice|yummy].
    {A} smelled the {snack.short} and closed {A.his} eyes.

    Then {A} saw {A.his} {B.tie} {B.full}. {B.He} [sat alone|looked sad|had nothing to eat].
    #came_by {B.He} looked at the {snack.short} with big eyes.
    Just then, {A.his} {B.tie} {B.full} sat down next to {A.him}. {B.He} had nothing to eat.

    <B says: [Hello|Hi], {A}. May I have some, please?>
    <B sadly: I am so hungry. I lost my lunch.>
    <B asks: What do you have there? Can I try some?>
    <B whispers: I forgot my lunch at home.>
    <B says: I have not eaten since this morning.>
    {B}'s tummy made a loud sound. <b softly: Sorry. I am hungry.>

    {A} did not want to share. <A says: No, I want to eat {snack.it} alone.>
    {A} held the {snack.short} tight. {A.He} wanted to keep {snack.it}.
    {A} thought for a moment. There was not very much to share.
    At first, {A} said no. {A.He} turned away to eat alone.
    <A says: But I only have this much.>
    {A} looked at the {snack.short}, and then at {B}.

    {B} looked down. A tear ran down {B.his} face. {A} saw it and felt bad.
    {B} said nothing, but {B.his} tummy made a sad little sound. Now {A} did not feel so good.
    Then {A} thought of the day when {B} had shared {B.his} {lent} with {A.him}.
    Then {A} remembered {A.his} {G.role}'s words: food tastes better when you share it.

    So {A} gave half of the {snack.short} to {B}. <A kindly: Here, this is for you.>
    <A says: I am sorry. Let us share.> {A} gave {B} the bigger part.
    {A} smiled at {B}. <A kindly: We can share. There is some for you and some for me.>
    <A says: Come, {B}, sit with me. Half is for you.>
    {A} held out the {snack.short}. <a kindly: Take as much as you like.>

    {B}'s eyes [shone|were bright]. <B happily: Thank you! You are so kind.>
    <B happily: Yum! This is so good. Thank you, {A}!>
    {B} ate and ate until {B.he} was full. <b happily: Thank you, {A}!>
    They sat side by side and ate every last bit.
    {B} took a bite and smiled. <b says: It tastes better with a friend.>

    Later, {B} let {A} play with {B.his} {lent}.
    The next day, {B} brought #treat and shared it with {A}.
    Then they [played|ran around|sang songs] together.
    #until_dark

    -
    #glad_end
    {A} learned that sharing makes two people happy.
    {A} felt [even better|much better] than before.
    {G} heard about it and was very proud of {A}.
    """,
)

BRAVE = Plot(
    name="being brave",
    hero="child",
    choices={
        "start, fear, advice, deed, after": (
            ("went to the swimming pool with {A.his} {G.role}", "the deep water",
             "You can hold my hand, and we will go in slowly",
             "put one foot into the water. Then {A.he} put in the other foot. Splash! {A.He} was in",
             "The water was not so bad"),
            ("came to a long, tall slide", "the slide", "I will stand at the end and catch you",
             "climbed up, step by step, and sat down at the top. Whoosh! Down {A.he} went", "It felt like flying"),
            ("had to go down into the cellar to get a jar of jam", "the dark", "You can take my little lamp with you",
             "took the lamp and went down the steps, one by one. There were only jars and boxes",
             "There was nothing bad in the dark"),
            ("had to sing a song in front of everyone at school", "all those people",
             "Look at me when you sing. I will smile at you",
             "stood up and began to sing, first softly and then loudly. Everyone clapped", "It was fun to sing"),
            ("came to a little bridge over a stream", "the bridge", "Look at the other side, and not at the water",
             "took a small step, and then one more. Soon {A.he} was on the other side", "The bridge was strong"),
            ("had to go to the doctor", "the doctor", "You can hold your toy bear, and I will be with you",
             "sat very still and opened {A.his} mouth wide. The doctor looked inside and smiled",
             "It did not hurt at all"),
            ("met a very big dog on the path", "the big dog", "Hold out your hand and let the dog smell it",
             "held out {A.his} hand. The dog smelled it and licked it with a warm, wet tongue",
             "The dog only wanted to play"),
            ("wanted to ride a pony for the first time", "the tall pony",
             "Hold on to me, and talk to the pony in a soft voice",
             "sat on the pony and held on. Clip, clop, the pony walked in a circle", "The pony was gentle and slow"),
        ),
    },
    text="""
    {When}, {who} {start}.
    {When}, {who} {start}. {A.He} stopped and did not move.

    {A} was [afraid|scared] of {fear}.
    {A.His} heart beat fast. {A.He} was [afraid|so scared] of {fear}.
    {A} looked at {A.his} feet. {A.He} had always been afraid of {fear}.
    {A.His} knees began to shake. {A} did not like {fear} at all.
    {A}'s tummy felt funny. It was always like that with {fear}.

    <A sadly: I cannot do it. I am scared.>
    <A whispers: I want to go home.>
    <A sadly: No, no! I am too little.>
    <A asks: Do I have to do it?>
    <A sadly: What if something bad happens?>
    {A} hid behind {A.his} {G.role}.
    -

    <G kindly: [It is all right to be afraid|Everyone is scared sometimes]. {advice}.>
    {G} took {A.his} hand. <G says: {advice}. You can do it.>
    <G kindly: Do you know what? I was scared, too, when I was little. {advice}.>
    <G kindly: You do not have to be big to be brave. {advice}.>

    {A} thought about it. Then {A.he} took a [deep|big] breath.
    {A} closed {A.his} eyes and counted: one, two, three.
    {A} nodded. <a whispers: I will be brave.>
    {A} was still a little afraid, but {A.he} wanted to try.
    <A thinks: I can do this. I can do this.>
    {A} held on to {A.his} {G.role} for one more moment. Then {A.he} let go.

    {A.He} {deed}!
    Slowly, {A.he} {deed}!
    Then {A.he} {deed}!

    <A happily: I did it! I did it!>
    <A happily: Look, {G}! I am not afraid!>
    {A} began to laugh. <a cries: Did you see that?>
    {A} felt as tall as a tree.
    <A asks: Is that all?> {A.He} laughed out loud.
    {A} smiled a big smile. It was not so bad.

    <G happily: I am so proud of you! You were very brave.>
    {G} clapped {G.his} hands. <G says: I knew that you could do it.>
    #hug
    {G} smiled. <G says: Being brave means that you are scared and you try.>

    {after}, and {A} wanted to do it again.
    <A asks: Can we do it again tomorrow?>
    After that, {A} was not afraid of {fear} any more.
    On the way home, {A} told everyone about it.

    -
    #bedtime
    #glad_end
    {A} learned that {A.he} could be brave.
    """,
)

MAKING = Plot(
    name="making a thing",
    choices={
        "gift, parts, step, trouble": (
            ("a #color paper boat/boat", "paper and glue", "folded the paper", "the paper tore"),
            ("a card with a #color flower/card", "paper and crayons", "drew a big flower", "the #color crayon broke"),
            ("a #size cake", "flour, eggs and sugar", "mixed it all in a bowl", "the flour fell on the floor"),
            ("a tower of blocks/tower", "all the blocks in the house", "put one block on top of the other",
             "it fell down"),
            ("a necklace of shells/necklace", "shells and a string", "put the shells on the string",
             "the string broke"),
            ("a house for the birds/house", "wood and nails", "put the wood together", "the roof fell off"),
            ("a #color clay pot/pot", "soft clay", "made the clay round", "one side fell in"),
            ("a #color kite", "paper, sticks and string", "tied the sticks together", "the paper tore"),
            ("a drum", "an old box and two spoons", "closed the box and painted it #color", "the box broke"),
            ("a snowman of paper/snowman", "white paper and a button", "cut out three white circles",
             "the head fell off"),
        ),
        "reason": (
            "It was for {A.his} {G.role}", "{A.He} wanted to give it to {A.his} {G.role}",
            "It was for {A.his} {G.role}'s birthday", "It was a surprise for {A.his} {G.role}",
        ),
    },
    text="""
    {When}, {who} wanted to make {gift}.
    {When}, {who} had a good idea. {A.He} would make {gift}!
    {When}, {who} sat at the table. <A says: I will make {gift}.>

    {reason}.
    -
    {A.He} had never made {gift} before.

    {A.He} got {parts}. Then {A.he} {step}.
    First, {A.he} looked for {parts}. After that, {A.he} {step}.
    {A} found {parts}. {A.He} sat down and {step}.
    {A.He} asked {A.his} {G.role} for {parts}. Then {A.he} {step}.

    But then, {trouble}! <A cries: Oh no!>
    It was going well, but suddenly {trouble}.
    {A} worked [hard|for a long time]. But then {trouble}!
    It looked good at first. Then {trouble}.

    <A sadly: I cannot do it. It is too hard.>
    {A} felt #sad. {A.He} wanted to stop.
    {A} was so angry that {A.he} stamped {A.his} foot.
    {A} put {A.his} head on the table and [cried|did not say a word].
    {A} looked at the mess. It did not look like {gift} at all.
    <A sadly: All that work, and now look at it!>

    #came_by <B says: I can help you. Let us try one more time.>
    #came_by <B asks: May I help you?> <A says: Yes, please!>
    Then {A.his} {B.tie} {B.full} came in. <B kindly: Do not give up. It just takes time.>
    {A.His} {B.tie} {B.full} sat down next to {A.him}. <B kindly: We can do it if we go slowly.>

    So {A} tried again, very slowly. {B} [held it still|helped {A.him}].
    {A} [took a deep breath|dried {A.his} eyes] and began again. This time, {B} helped.
    They worked side by side. They were slow and careful.
    One did one part, and the other did the next. {A} even sang a song.
    {B} showed {A} how to do it, and {A} did it all over again.

    At last, the {gift.short} was done. It was [beautiful|just right|so pretty]!
    After a while, {A} held up the {gift.short}. <A happily: Look! We made it!>
    And look! There it was: {gift}. It was not perfect, but it was very [nice|pretty].
    When the sun was low, they were done. {A} could not stop looking at the {gift.short}.

    {A} showed it to {A.his} {G.role}. <G happily: Did you make this? It is [wonderful|beautiful]!>
    When {G} saw the {gift.short}, {G.he} smiled and smiled. <G happily: How pretty! You worked so hard.>
    {G} came in and saw the {gift.short}. <G happily: Oh, {A}, I love it!>

    {A} was #happy.
    #thanks
    <A says: {B} helped me. We did it together.>
    #hug

    -
    #glad_end
    {A} learned to try again when something goes wrong.
    It is good to try one more time.
    """,
)

HURT_ANIMAL = Plot(
    name="helping an animal",
    hero="child",
    places=("the park", "the farm", "the pond", "the meadow"),
    choices={
        "pet, trouble, care, well": (
            ("a tiny bird", "It had fallen out of its nest", "picked up the bird and made it warm in both hands",
             "spread its wings and flew up to its nest"),
            ("a #color kitten", "It was cold and wet", "dried the kitten with {A.his} scarf and held it close",
             "purred and rubbed its head on {A.his} hand"),
            ("a little turtle", "It was on its back and could not turn over", "turned the turtle over with both hands",
             "walked in a circle on its short legs"),
            ("a small puppy", "It had a thorn in its paw", "took out the thorn and washed the paw",
             "wagged its tail and jumped up and down"),
            ("a baby duck", "It could not find its mother", "carried the duck to the water in {A.his} hat",
             "swam to its mother as fast as it could"),
            ("a little hedgehog", "It was thin and hungry", "gave the hedgehog some of {A.his} lunch",
             "ran around on its tiny feet"),
            ("a #color butterfly", "It was caught in a spider web", "pulled the threads away, one by one",
             "opened its wings and danced in the air"),
            ("a baby rabbit", "It was stuck in a hole", "dug with both hands until the hole was wide",
             "hopped out and shook its long ears"),
        ),
    },
    text="""
    {When}, {who} walked {place.to} with {A.his} {G.role}.
    {When}, {who} was {place.at}. {A.His} {G.role} was there, too.
    {When}, {who} and {A.his} {G.role} went {place.to}.

    -
    #look_around
    {day.sky}

    Suddenly, {A} heard a [soft|small|sad] sound. There was {pet} {place.spot}.
    There, {place.spot}, {A} saw {pet}.
    Then {A} stopped. <a whispers: Look, {G}! There is {pet}.>

    {trouble}.
    {trouble}. <A cries: Oh, you poor little {pet.short}!>
    The {pet.short} looked at {A} with [big|sad|frightened] eyes. {trouble}.

    <A asks: What can we do, {G}?> <G answers: We can help it. But we must be very gentle.>
    {A} wanted to help. <A whispers: Do not be afraid. I will not hurt you.>
    <A asks: Who will help it, if we do not?> {G} smiled. <G answers: Then let us help it together.>
    <A asks: Can we help it?> {G} nodded. <G kindly: Yes, but be gentle.>

    So {A} {care}.
    Very gently, {A} {care}. {G} [watched|helped].
    {A} {care}. {A.He} talked to it in a soft voice all the time.

    The {pet.short} was not afraid any more.
    At first, the {pet.short} did not move. {A} waited.
    {A} stayed with the {pet.short} for a long time.
    <A whispers: You are safe now, little {pet.short}.>
    {A} could feel how fast its tiny heart beat.
    -

    Then the {pet.short} {well}!
    Soon, the {pet.short} felt better. It {well}!
    And then, all at once, the {pet.short} {well}. <A happily: It worked!>

    <G says: You have a kind heart, {A}.>
    <A happily: Look, {G}! The {pet.short} is all right now!>
    {A} clapped {A.his} hands. <A says: Goodbye, little {pet.short}! Be careful!>
    #hug

    The next day, {A} came back. There was the {pet.short}! It had not forgotten {A.him}.
    After that, {A} often saw the {pet.short} {place.at}.
    The {pet.short} looked back one more time, as if to say thank you.
    {A} thought about the {pet.short} all the way home.
    {A} drew the {pet.short} and hung the picture over {A.his} bed.
    In the evening, {A} told {A.his} {B.tie} {B.full} about the {pet.short}.

    -
    #glad_end
    {A} learned that even a small friend can need help.
    It feels good to help someone small.
    """,
)

RAIN = Plot(
    name="rain spoils the plan",
    places=ABROAD,
    days=("sunny", "warm", "bright", "cloudy"),
    choices={
        "When": MORNING,
        "plan, pack, indoors": (
            ("have a picnic", "put bread, cheese and apples in a basket",
             "sat on a #color blanket on the floor and ate it all"),
            ("fly a #color kite", "took the kite and a long string",
             "ran around the house and made the kite fly behind them"),
            ("play ball", "took the #color ball and put on {A.his} shoes",
             "rolled the ball down the stairs and caught it again"),
            ("look for shells and stones", "took a bucket and a small net",
             "hid spoons and buttons in the house and looked for them"),
            ("sleep in a tent", "packed a lamp and a warm blanket", "made a tent out of chairs and blankets"),
            ("ride the pony", "put on {A.his} boots and {A.his} hat", "made a pony out of a broom and an old sock"),
            ("build a castle", "took a #color bucket", "built a castle out of boxes and pillows"),
            ("have a race", "put on {A.his} best shoes", "made two paper snails and had a very slow race"),
        ),
    },
    text="""
    {When}, {who} wanted to go {place.to} with {A.his} {B.tie} {B.full}. They wanted to {plan}.
    {When}, {who} woke up. Today, {A.he} and {A.his} {B.tie} {B.full} wanted to go {place.to} and {plan}.
    {When}, {who} and {A.his} {B.tie} {B.full} had a plan. They wanted to {plan} {place.at}.

    {A} {pack}. {A.He} could not wait.
    {A} {pack}. <A happily: Now I am ready!>
    {A} was #happy. {A.He} {pack}.

    But then big, dark clouds came. Drip, drop, it began to rain.
    But when they opened the door, it began to rain. Soon it was raining hard.
    Suddenly, there was a loud boom. The rain fell down, more and more.
    Then a drop fell on {B}'s nose. And another. It was raining!

    <A sadly: Oh no! Now we cannot {plan}.>
    {A} looked out of the window. {A.He} felt #sad.
    <B sadly: We wanted it so much.> {A} nodded.
    {A} pressed {A.his} nose to the glass. Everything was gray and wet.
    <A angrily: I do not like the rain! It is not fair.>
    {A} and {B} sat by the window. The drops ran down the glass.

    They waited and waited, but the rain did not stop.
    <B asks: When will it stop?> Nobody knew.
    {G} came and sat down with them. <G kindly: The flowers are happy about the rain.>
    -

    Then {B} had an idea. <B says: We can play inside!>
    <G asks: Why not do it in here?> {A} looked at {B}, and {B} looked at {A}.
    {A} thought and thought. Then {A.he} smiled. <A happily: I know what we can do!>
    <B says: The rain cannot come into the house. Let us do it here!>

    So they {indoors}.
    And that is what they did. They {indoors}.
    They got up and {indoors}. {G} helped, too.

    They laughed so much that they forgot the rain.
    <A happily: This is the best rainy day!>
    They did it again and again, and each time it was more fun.
    It was so [funny|much fun] that they could not stop laughing.
    <B happily: This is even better!>
    Outside, the rain sang on the roof. Inside, it was warm and dry.

    When the rain stopped, there was a rainbow in the sky.
    In the evening, the sun came out again. They ran outside and jumped in the puddles.
    Later, {G} brought them #treat.
    -

    <A says: I like the rain now.>
    <A happily: I hope that it rains again tomorrow!>
    #glad_end
    {A} learned that a rainy day can be a good day, too.
    """,
)

QUARREL = Plot(
    name="a quarrel and making up",
    choices={
        "thing": TOYS[:15],
    },
    text="""
    {When}, {who} and {A.his} {B.tie} {B.full} were playing {place.at}.
    {When}, {who} went {place.to} with {A.his} {B.tie} {B.full}.
    {When}, {who} played with {A.his} {B.tie} {B.full}.

    They found {thing}.
    There was {thing}, but only one.
    {A} had {thing}. {B} liked the {thing.short} very much.
    {B} had brought {thing}. {A} thought that it was very nice.

    <A says: I want to play with it!> <B answers: No, I want it!>
    <A says: It is my turn now.> <B answers: No, it is my turn!>
    Both wanted the {thing.short}. <A angrily: Give it to me!> <B angrily: No! I had it first!>
    <B angrily: I want the {thing.short}!> <A angrily: You cannot have it!>

    {A} pulled, and {B} pulled, too. Then they both fell down.
    They pulled and pulled. [Bump!|Oops!] They both sat on the {place.ground}.
    {A} pushed {B}, and {B} pushed {A}. The {thing.short} fell into the mud.
    They [shouted|yelled] so loudly that the birds flew away.

    {B} began to cry. <B sadly: You are not my friend any more!>
    {A} turned {A.his} back to {B}. Nobody said a word.
    <A angrily: I never want to play with you again!> {B} ran away.
    {B}'s face was red, and {A}'s face was red, too.
    {B} walked away and sat down {place.spot}. {A} sat down {place.spot2}.
    Now nobody was happy. The {thing.short} was there, but nobody played with it.

    {A} played alone for a while, but it was no fun.
    After a while, {A} felt #sad. It was lonely without {B}.
    {G} had seen it all. <G asks: What is more important, a {thing.short} or a friend?>
    {A} looked at the {thing.short}. It did not look so nice any more.
    {A} thought of all the games that they had played together.
    A cloud came over the sun. {A} felt cold and lonely.

    So {A} went to {B}. <A says: I am sorry. I should not have been so mean.>
    {A} walked over to {B} and sat down. <A softly: I am sorry, {B}.>
    {A} held out the {thing.short}. <A says: I am sorry. You can have it first.>

    <B answers: I am sorry, too. Let us be friends again.>
    {B} dried {B.his} tears and smiled. <B answers: I am sorry, too.>
    {B} looked up. <B asks: Can we take turns?> <A answers: Yes!>
    {B} gave {A} a hug. <B says: I do not want to fight.>
    {B} looked at {A} for a moment. Then {B.he} laughed. <B says: We were so silly!>

    They took turns. First {B} had the {thing.short}, and then {A} had it.
    Then they thought of a game for two. It was much more fun.
    From then on, they shared the {thing.short}.
    #until_dark

    -
    #glad_end
    They were [good|best] friends again.
    {A} learned that a friend is better than a toy.
    They learned to say sorry and to take turns.
    """,
)

SKILL = Plot(
    name="learning a skill",
    choices={
        "skill, failing, trick, doing": (
            ("ride a bike", "fell into the grass", "Look ahead and keep your feet moving",
             "rode all the way down the path"),
            ("swim", "got water in {A.his} nose", "Kick with your legs like a frog", "swam from one side to the other"),
            ("jump rope", "got caught in the rope", "Listen to the beat and then jump",
             "jumped ten times without a mistake"),
            ("whistle", "blew and blew, but only air came out", "Make your mouth very small and round",
             "whistled a whole song"),
            ("skate", "sat down hard on the ice", "Bend your knees and go slowly", "went around in a big circle"),
            ("tie shoes", "made a big, bad knot", "First make two ears, like the ears of a rabbit",
             "tied one shoe and then the other"),
            ("catch a ball", "let the ball fall on the ground", "Keep your eyes on the ball",
             "caught the ball with both hands"),
            ("do a handstand", "fell over like a tree", "Look at the ground and keep your legs up",
             "stood on {A.his} hands and counted to five"),
            ("play the drum", "lost the beat", "Count to four, over and over", "played a song from start to end"),
            ("climb the big tree", "slid right back down", "Hold on with both hands before you move your feet",
             "climbed up to the first branch"),
            ("write", "wrote the letters the wrong way around", "Go slowly, one letter at a time",
             "wrote {A.his} whole name"),
        ),
    },
    text="""
    {When}, {who} wanted to learn to {skill}. {A.His} {B.tie} {B.full} could do it very well.
    {When}, {who} saw {A.his} {B.tie} {B.full}. {B.He} could {skill}!
    {When}, {who} said to {A.his} {B.tie} {B.full}, "I want to learn to {skill}, just like you."

    It looked so easy. But when {A} tried, {A.he} {failing}.
    {A} tried it right away. [Oh dear!|Oops!] {A.He} {failing}.
    The first time, {A} {failing}. The second time, {A.he} {failing} again.

    <A sadly: This is too hard. I will never learn to {skill}.>
    <A angrily: I give up!>
    {A} was #sad. Why was it so hard?
    {A} sat down. <a sadly: I cannot do it.>
    <A asks: Why can everyone do it, and I cannot?>
    {A} wanted to go home and never try again.

    <B asks: Do you think that I could do it on the first day? I had to try many times.>
    <B kindly: Do not give up. I will show you how.>
    {B} sat down next to {A}. <B says: I could not do it at first, either.>
    <B says: Everyone has to learn it. It takes time.>

    <B says: {trick}.>
    Then {B} showed {A} a trick. <B says: {trick}.>
    <B says: Watch me. {trick}.> {A} watched very closely.

    {A} tried again. It was a little better.
    So {A} tried again, and again, and again.
    Every day, {A} tried a little more. Sometimes {A.he} {failing}, but {A.he} did not stop.
    {A} worked on it all [morning|afternoon|week].
    {A} did what {B} had said. One time, it almost worked!
    Again {A} {failing}. But now {A.he} laughed and got up.

    Then, one [morning|evening|day], {A} {doing}!
    And at last, it worked. {A} {doing}!
    On the [third|fourth|fifth] day, {A} {doing}! It was like magic.

    <A cries: Look at me! I can do it!>
    <A happily: I can {skill}! I can {skill}!>
    {A} could not believe it. <a cries: {B}, did you see that?>
    {A} jumped up and down with joy.
    {A} did it again, just to be sure. Yes! It worked again!

    {B} clapped and cheered. <B happily: I knew it!>
    <B happily: Well done, {A}!>
    {G} had seen it, too. <G happily: You did not give up. I am so proud!>
    {A} ran to tell {A.his} {G.role}. {G} was very proud.

    -
    Now {A} wants to teach it to someone, too.
    #glad_end
    {A} learned that you have to try many times.
    Now {A} and {B} [could do it together|did it together every day].
    """,
)

SURPRISE = Plot(
    name="a surprise",
    choices={
        "When": MORNING,
        "gift": GIFTS,
        "rooms": ("the kitchen", "the garden", "the living room", "the barn", "the yard"),
    },
    text="""
    {When}, {who} woke up. It was {A.his} birthday!
    {When}, {who} was very excited, because it was {A.his} birthday.
    {When}, {who} jumped out of bed. <A happily: Today is my birthday!>

    But in the kitchen, {G} only said, "Good morning."
    {A} ran to {A.his} {G.role}, but {G} was busy and did not say a word about it.
    There was no cake on the table, and no gift.

    {A} went to see {A.his} {B.tie} {B.full}. <B says: I have no time today. Goodbye!>
    Then {A} met {A.his} {B.tie} {B.full}. <A asks: Do you want to play?> <B answers: Not now. I have to go.>
    {A} looked for {A.his} {B.tie} {B.full}. But {B} ran away with something behind {B.his} back.

    {A} felt #sad. <A thinks: Nobody remembers my birthday.>
    <A thinks: Did everyone forget?> {A.He} sat down alone {place.at}.
    {A} walked {place.to} and sat down. A tear ran down {A.his} face.
    <A asks: Does nobody know what day it is?> But nobody was there to answer.

    #look_around But {A} did not smile.
    -
    {A.He} stayed there for a long time.

    In the afternoon, {G} called {A.him}. <G says: Come into {rooms}, please.>
    Then {A} heard {A.his} {G.role}'s voice. <G says: Please come and help me in {rooms}.>
    When the sun was low, {A} went home. It was quiet, and {rooms} was dark.

    {A} opened the door. <B happily: Surprise! Happy birthday, {A}!>
    Suddenly, there was light everywhere. <B happily: Surprise!>
    And there they were, all {A.his} friends! <B cries: Happy birthday!>

    There was a big cake, and there were #color balloons.
    There were #color balloons, #color flowers and a cake with #number candles.
    {A} saw #number gifts, a #color cake, and #color paper stars on the walls.
    On the table stood a #color cake. {A} blew out all the candles.

    {B} gave {A} {gift}. <B says: I made {gift.it} for you. That is why I had no time.>
    {A} opened a box from {B}. In the box {gift.was} {gift}!
    <B says: This is for you.> It was a box, and in the box {gift.was} {gift}.

    <A happily: I thought that you forgot me! Thank you, thank you!>
    {A} laughed and cried at the same time. <a says: This is the best surprise!>
    {A} loved the {gift.short}. <a happily: Thank you, {B}! Thank you, {G}!>
    {A} [hugged|kissed] {G}. Then {A.he} hugged {B}, too.

    They ate cake and played games until #sunset.
    They sang and danced [all evening|until #sunset].
    #glad_end
    {A} was not sad any more. {A.He} had the best friends of all.
    """,
)

PROMISE = Plot(
    name="a promise kept",
    hero="child",
    days=("sunny", "warm", "bright", "windy"),
    choices={
        "task, result": (
            ("feed the hens", "The hens ran to {A.him} and ate all the corn"),
            ("water the flowers", "The flowers lifted their heads and smelled sweet"),
            ("take a letter to the old man next door", "The old man read the letter and smiled"),
            ("watch the baby", "The baby laughed and held on to {A.his} finger"),
            ("pick berries for the cake", "Soon the basket was full of red berries"),
            ("look after the little lamb", "The lamb drank its milk and fell asleep on {A.his} lap"),
            ("take a pot of soup to a sick neighbor", "The neighbor ate the soup and felt better"),
            ("clean the bird's cage", "The bird sang a happy song in its clean cage"),
        ),
        "fun": (
            "swim in the lake", "play hide and seek", "eat ice cream", "fly a kite", "look at the new puppy",
            "play ball", "climb trees", "go to the fair",
        ),
    },
    text="""
    {When}, {who} made a promise to {A.his} {G.role}. {A.He} promised to {task}.
    {When}, {who} was asked by {A.his} {G.role} to {task}. <A says: Yes, I will. I promise.>
    {When}, {who} heard {A.his} {G.role} call. <G asks: Can you {task} today, please?> <A answers: I promise!>

    Then {A} went {place.to} for a while.
    First, {A} had some time to play {place.at}.
    {A} walked out of the house.

    -
    #look_around
    {day.sky}

    There, {A} met {A.his} {B.tie} {B.full}. <B happily: Come, let us {fun}!>
    #came_by <B asks: Do you want to {fun} with me?>
    {A.His} {B.tie} {B.full} ran up to {A.him}. <B happily: Guess what? We can {fun} now!>

    {A} wanted to {fun} so much! But then {A.he} remembered {A.his} promise.
    {A} loved to {fun}. {A.He} almost said yes. But what about {A.his} promise?
    {A} took one step. Then {A.he} stopped. {A.He} had promised to {task}.
    {A}'s feet wanted to go, but {A.his} heart said no. There was still the promise.

    <A says: I am sorry, I cannot come now. I made a promise to {G}.>
    <A says: Not yet. First I have to {task}.>
    <A answers: I would like to, but I have to {task}. I promised.>

    <B asks: Can you not do it tomorrow?> {A} shook {A.his} head. <A answers: No. A promise is a promise.>
    {B} was a little sad, but {B.he} understood.
    <B says: Nobody will know.> <A answers: But I will know.>
    {B} thought about it. <b says: Then I will wait for you.>
    <B says: You are right. I will help you, and then we will {fun}.>
    -

    So {A} went back to {task}. {result}.
    {A} ran to {task}, as {A.he} had said. {result}.
    It was not easy to leave, but {A} went to {task}. {result}.

    {G} saw it and smiled. <G happily: You kept your promise. Thank you!>
    <G happily: I knew that I could trust you, {A}.>
    When {G} heard about it, {G.he} gave {A} a big hug.

    <G says: Now you can go and {fun}!> {A} ran to {B}, and they had a lot of fun.
    And there was still time to {fun}. {B} had waited for {A.him}!
    The next day, {G} took {A} and {B} to {fun}.

    -
    #glad_end
    {A} learned that it feels good to keep a promise.
    A promise is a promise.
    """,
)

HONESTY = Plot(
    name="an honest confession",
    choices={
        "thing, how": (
            ("a #color cup", "hit it with {A.his} elbow"),
            ("a #color vase", "ran through the room with a ball"),
            ("a #color plate", "wanted to carry too many things"),
            ("an old clock", "wanted to see what was inside"),
            ("a #color lamp", "danced too close to it"),
            ("a glass bowl", "jumped on the sofa"),
            ("a #size flower pot/pot", "kicked a ball in the house"),
            ("a #color teapot", "played with it like a boat"),
        ),
        "hiding": (
            "under the bed", "behind the sofa", "in a box", "under a pillow", "in the closet", "behind the curtain",
        ),
    },
    text="""
    {When}, {who} was playing in the house.
    {When}, {who} was at home. {A.His} {G.role} was in the garden.
    {When}, {who} ran around in the house, faster and faster.

    There was {thing} on the table. {G} loved it very much.
    On the shelf stood {thing}. It was {A.his} {G.role}'s favorite {thing.short}.
    {A.His} {G.role} had {thing}. It was very old, and {G.he} loved it.

    {A} {how}. Crash! The {thing.short} fell down and broke.
    Then {A} {how}, and the {thing.short} fell on the floor. Crash! It was in pieces.
    {A} was not careful. {A.He} {how}, and down fell the {thing.short}. It broke!

    <A whispers: Oh no! What have I done?>
    {A} stood very still. {A.His} heart beat fast.
    <A thinks: {G} will be so angry!>
    {A} looked at the door. Had anyone heard it?
    {A} wanted to put it together again, but there were too many pieces.

    Quickly, {A} picked up the pieces and hid them {hiding}.
    {A} was afraid. So {A.he} hid the pieces {hiding} and did not tell anyone.
    {A} put the broken {thing.short} {hiding}. Then {A.he} ran to {A.his} room.

    Soon, {G} came in. <G asks: Where is my {thing.short}?> {A} looked at the floor.
    Later, {G} looked around. <G asks: Have you seen my {thing.short}, {A}?> {A} said, "No."
    At dinner, {G} asked about the {thing.short}. {A} said nothing.

    But {A.his} tummy hurt, and {A.he} could not eat.
    {A} felt bad. It was not nice to have a secret like that.
    That night, {A} could not sleep. {A.He} thought about the {thing.short} all the time.
    {A} tried to play, but nothing was fun.
    Every time {A} saw {A.his} {G.role}, {A.he} looked away.
    The secret felt like a big stone in {A.his} tummy.

    At last, {A} went to {A.his} {G.role}. <A sadly: I broke your {thing.short}. I am so sorry.>
    So {A} took the pieces and brought them to {A.his} {G.role}. <A sadly: It was me. I broke it and hid it.>
    Then {A} began to cry. <A sadly: {G}, I have to tell you something. I broke the {thing.short}.>

    {G} was quiet for a moment. <G kindly: I am sad about the {thing.short}, but I am glad that you told me.>
    {G} took {A} in {G.his} arms. <G kindly: Thank you for telling me the truth. That was brave.>
    <G kindly: A {thing.short} can break. But the truth is worth more than a {thing.short}.>

    Together, they glued the pieces. The {thing.short} had lines now, but {G} still loved it.
    They cleaned up together. <A says: I will be more careful.>
    The next day, {A} made a new {thing.short} out of clay. {G} liked it even more than the old one.
    #hug

    -
    #glad_end
    {A} felt light again, like a bird.
    {A} learned to tell the truth.
    That night, {A} slept well.
    """,
)

SEED = Plot(
    name="patience with a seed",
    places=("the garden", "the farm", "the yard"),
    choices={
        "plant, grown": (
            ("a sunflower", "a tall yellow sunflower"),
            ("a bean", "a long green bean"),
            ("a pumpkin", "a round orange pumpkin"),
            ("a carrot", "a sweet orange carrot"),
            ("a tomato", "a fat red tomato"),
            ("a strawberry", "a sweet red strawberry"),
            ("an apple tree/tree", "a small green tree"),
            ("a rose", "a #color rose"),
            ("a tulip", "a #color tulip"),
            ("a melon", "a big green melon"),
        ),
    },
    text="""
    {When}, {who} got a tiny seed from {A.his} {G.role}.
    {When}, {who} found a small brown seed {place.spot}.
    {When}, {who} was {place.at} with {A.his} {G.role}. {G} gave {A.him} a seed.

    <A asks: What is this?> <G answers: If you plant it, it will become {plant}.>
    <G says: Put it in the ground, and one day there will be {plant}.>
    <A asks: Will it be {plant}?> <G answers: Yes. But it needs time.>

    {A} made a small hole and put the seed in. Then {A.he} gave it some water.
    {A} dug a little hole, put in the seed, and covered it with earth.
    So {A} planted the seed. <A whispers: Good night, little seed.>

    The next morning, {A} ran {place.to}. Nothing! There was only brown earth.
    {A} sat down and waited. {A.He} waited until dinner, but nothing came.
    On the next day, {A} looked at the ground. Nothing. On the day after that, nothing.

    <A sadly: It does not grow. Maybe it is sleeping.>
    <A angrily: I do not want to wait any more! I will dig it up.>
    <A asks: Why does it take so long, {G}?>
    {A} wanted to dig it up and look.
    <A asks: Is the seed broken?>
    {A} sat next to the hole and made a sad face.

    <G kindly: Good things take time. Give it water and sun, and wait.>
    <G kindly: You were a tiny baby, and look how long it took you to grow!>
    <G kindly: The seed is working where you cannot see it. Be patient.>

    So {A} gave it water every day. {A.He} sang to it, too.
    {A} waited. The sun came, and the rain came. Every day, {A} gave it water.
    {A} put a little #color flag next to it, so that nobody would step on it.
    The days went by. {A} counted them: #number, and then some more.
    For many days, {A} did not dig. {A.He} only gave it water and talked to it.

    Then, one morning, there was something green! <A cries: {G}, come and look!>
    And one day, a tiny green leaf came out of the ground. {A} jumped for joy.
    At last, a small green point looked out of the earth. <A whispers: Hello, little plant!>
    After the rain, {A} bent down and looked. There were two tiny green leaves!

    It grew and grew. When the summer came, there was {grown}!
    Day after day, it grew. It became bigger and bigger. And then there was {grown}!
    The leaf became two leaves, and then four. In the end, there was {grown}.

    <A happily: I did it! I waited, and it came!>
    {A} showed it to {A.his} {B.tie} {B.full}. <B says: How beautiful! Can I have a seed, too?>
    <G happily: You were so patient, {A}.>
    {A} was #happy. It had been worth the wait.

    -
    #glad_end
    {A} learned to wait.
    {A} learned that good things take time.
    """,
)

NEW_FRIEND = Plot(
    name="a new friend",
    choices={
        "game": (
            "play hide and seek", "play ball", "build a castle", "draw pictures", "play with my blocks", "jump rope",
            "look for bugs", "have a race", "feed the ducks", "make a crown of flowers",
        ),
        "origin": ("a town by the sea", "a far land", "the other side of the hill", "a big city", "a small village"),
    },
    text="""
    {When}, {who} was {place.at}. {A.He} saw {B.a} who was new there.
    {When}, {who} went {place.to}. There was {B.a} who had never been there before.
    {When}, {who} saw {B.a} {place.at}. {A.He} did not know {B.him}.

    The new {B.kind} sat alone and looked at the {place.ground}.
    The new {B.kind} stood {place.spot} and did not say a word.
    The new {B.kind} looked [sad|shy|lonely]. Nobody played with {B.him}.

    {A} wanted to say hello, but {A.he} was shy, too.
    <A thinks: I would be sad if I had nobody to play with.>
    {A} thought of the time when {A.he} was new. It had not been easy.
    Some others laughed at the new {B.kind}. {A} did not like that.
    {A} looked at {B.him} for a while. {B.He} had nice eyes.
    <A thinks: Maybe {B.he} is just as shy as I am.>

    {A} took a deep breath and walked over. <A says: Hello! My name is {A}. What is your name?>
    So {A} went over and sat down. <A kindly: Hi, I am {A}. Who are you?>
    {A} smiled and waved. <A says: Hello! Are you new here? What is your name?>

    <the new {B.kind} whispers: My name is {B}. I come from {origin}.>
    <the {B.kind} answers: I am {B}. I have no friends here.>
    <the {B.kind} softly: {B} is my name. We moved here from {origin}.>

    <A asks: Do you want to {game} with me?>
    <A says: I know a good game. Let us {game}!>
    <A happily: Then I will be your first friend! Come, we can {game}.>

    {B} looked up, and a smile came over {B.his} face. <B answers: Yes, please!>
    {B} nodded. <B says: I love to do that!>
    <B asks: Really? With me?> <A answers: Yes, with you!>

    First {A} showed {B} how to do it. Then {B} showed {A} a new way.
    They had so much fun that they forgot the time. #look_around
    They laughed a lot. {B} was not shy any more.
    {B} told {A} about {origin}, and {A} told {B} all {A.his} secrets.
    {B} was very good at it. <A happily: You must teach me that!>

    Soon, the others came and wanted to play, too.
    Then {G} came with #treat for each of them.
    When it was time to go, {B} gave {A} a #color [stone|shell|leaf|flower].
    -

    <B asks: Will you come back tomorrow?> <A answers: Yes! We are friends now.>
    <A says: See you tomorrow, {B}!> And {B} smiled all the way home.
    From that day on, {A} and {B} played together every day.

    -
    #bedtime
    {A} learned that one kind word can make a friend.
    It is good to be kind to someone new.
    #glad_end
    """,
)

NIGHT = Plot(
    name="a noise in the night",
    choices={
        "When": ("One night", "One dark night", "Late one night", "One windy night", "One cold night"),
        "sound, cause, link": (
            ("tap, tap, tap", "a branch", "It moved in the wind and tapped on the window"),
            ("scratch, scratch", "the cat", "It wanted to come in and scratched at the door"),
            ("drip, drop", "the tap in the kitchen", "A drop of water fell from it, and then another"),
            ("hoo, hoo", "an old owl", "It sat in the tree and sang its song"),
            ("squeak, squeak", "a tiny mouse", "It was eating a bit of cheese"),
            ("bump, bump", "the shutter", "It moved in the wind and bumped against the wall"),
            ("creak, creak", "the old stairs", "They were old and made that sound all by themselves"),
            ("rattle, rattle", "an empty can", "The wind rolled it over the stones"),
        ),
        "monster": ("a monster", "a ghost", "a big bad wolf", "a dragon", "a giant"),
    },
    text="""
    {When}, {who} could not sleep.
    {When}, {who} woke up in bed. It was dark.
    {When}, {who} was in bed. The moon looked in at the window.

    Suddenly, there was a noise. It went {sound}.
    Then {A} heard something: {sound}.
    {A} listened. {sound.cap}! What was that?

    <A whispers: What is that? Is it {monster}?>
    {A} pulled the blanket over {A.his} head. {A.He} thought of {monster}.
    {A} was afraid. <A thinks: It must be {monster}!>

    There it was again: {sound}!
    For a moment, it was quiet. Then it came again: {sound}!
    {A} held {A.his} breath and did not move.
    The noise did not stop.
    {A.His} heart went boom, boom, boom.
    -

    <A cries: {G}! {G}! Please come!>
    {A} took {A.his} [toy bear|pillow|blanket] and ran to {A.his} {G.role}. <A whispers: There is something in the
        dark.>
    {A} called {A.his} {G.role}. <A sadly: I am scared. There is {monster} in the house!>

    {G} came with a little lamp. <G kindly: Let us go and look together.>
    <G kindly: I am here. Shall we find out what it is?>
    {G} took {A} along. <G says: Come, we will see what it is.>

    They walked on their toes, very quietly. {sound.cap}! It was close now.
    Step by step, they went closer. {A} held on to {G}.
    {G} held up the light. {A} looked out from behind {G.him}.

    It was only {cause}! {link}.
    And what did they see? It was {cause}. {link}.
    There was no monster at all. It was just {cause}. {link}.

    {A} began to laugh. <a says: I was afraid of {cause}!>
    {A} felt a little silly, but very glad.
    <A happily: Only {cause}? That is so funny!>
    {G} laughed, and {A} laughed, too.

    <G says: In the dark, small things sound big.>
    <G kindly: Now you know what it is, and you do not have to be afraid.>
    {G} took {A} back to bed and sang a soft song.
    {G} gave {A} a kiss and a cup of warm milk.

    {A} closed {A.his} eyes. {sound.cap}, it went, but now {A} only smiled and fell asleep.
    Soon, {A} was fast asleep.
    Now the noise was like a little song, and {A} slept until the morning.

    -
    {A} learned that it helps to look.
    In the morning, {A} told {A.his} {B.tie} {B.full} all about it.
    """,
)

GREEDY = Plot(
    name="too much of a good thing",
    choices={
        "snack, more": (
            ("some sweet cookies", "just one more"),
            ("some ripe cherries", "just one more"),
            ("some sweet berries", "a few more"),
            ("some chocolate eggs/chocolate eggs", "just one more"),
            ("some warm pancakes", "just one more"),
            ("some honey cakes/cakes", "just one more"),
            ("some #color candies", "a few more"),
            ("some sweet plums", "just one more"),
            ("some red grapes", "a few more"),
        ),
    },
    text="""
    {When}, {who} saw a big bowl on the table. There were {snack.own} in it.
    {When}, {who} came into the kitchen. {A.His} {G.role} had {snack} in a big bowl.
    {When}, {who} smelled something good. It was a plate with {snack.own}.

    <G says: You can have two. The others are for your {B.tie} {B}.>
    <G says: Please leave them alone. They are for the party.>
    <G says: Do not eat too many, or your tummy will hurt.>

    Then {G} went out of the room.
    {G} went into the garden, and {A} was alone.
    {A} nodded. Then {G} went to the door to meet someone.

    {A} took one. It was so good! Then {A.he} took {more}.
    The {snack.short} looked so good. <A thinks: I will take {more}. Nobody will see it.>
    {A} ate one, and then another. <A says: Yum! Just one more!>

    {A} ate and ate until the bowl was empty.
    Soon, there was not a single one left.
    One more, and one more, and one more. In the end, they were all gone.
    {A} could not stop. Then {A} looked into the bowl, and there was nothing left.

    Then {A.his} tummy began to hurt. <A sadly: Ow! I do not feel so good.>
    But what was that? {A.His} tummy was big and round, and it hurt.
    {A} had to lie down. {A.His} tummy made funny sounds.
    Soon, {A} felt sick. {A.He} did not want to see any more {snack.short}.

    {G} came back and saw the empty bowl. <G asks: Where are all the {snack.short}?>
    {B.full}, {A.his} {B.tie}, came in. <B sadly: Oh! There are no {snack.short} left for me.>
    When {G} came in, {G.he} looked at the bowl, and then at {A}. <G asks: Did you eat them all?>

    {A} turned red. <a sadly: I am sorry. I ate them all.>
    <A sadly: I ate too many. I am so sorry.>
    {A} did not want to lie. <A says: Yes, it was me. I could not stop.>

    {G} made {A} a cup of tea. <G kindly: Now you know why too much is too much.>
    <G says: It was not right, but I am glad that you say it.> {G.He} put a warm cloth on {A.his} tummy.
    {G} sat down next to {A} until the tummy was better.

    The next day, {A} helped to fill the bowl again. {A.He} gave the biggest part to {A.his} {B.tie} {B}.
    Later, {G} filled the bowl again. This time, {A} only ate two.
    <A says: Next time, I will share with my {B.tie} {B}.> And {A.he} did.

    -
    {A} learned not to be greedy.
    {A} learned that two are better than ten.
    #glad_end
    """,
)

GIFT = Plot(
    name="a gift without money",
    choices={
        "wish, price": (
            ("a #color hat", "too much money"),
            ("a #color scarf", "more than {A.he} had"),
            ("a silver ring", "a lot of money"),
            ("a big box of chocolates/box", "more than two coins"),
            ("a #color teapot", "ten coins"),
            ("a golden necklace", "so much money"),
        ),
        "own, work": (
            ("a picture", "drew {G} in a garden full of flowers"),
            ("a song", "thought of the words and sang them over and over"),
            ("a bunch of flowers/bunch", "picked #color flowers and tied them with a string"),
            ("a crown of leaves/crown", "put the leaves together, one by one"),
            ("a painted stone/stone", "painted a #color heart on it"),
            ("a little dance/dance", "made up the steps and turned and jumped until it was just right"),
        ),
    },
    text="""
    {When}, {who} wanted to give {A.his} {G.role} a gift. It was {G.his} birthday.
    {When}, {who} thought about {A.his} {G.role}'s birthday. What could {A.he} give {G.him}?
    {When}, {who} heard that it was {A.his} {G.role}'s birthday.

    {A} went to the shop with {A.his} {B.tie} {B.full}. There was {wish} in the window.
    {A} walked to the shop with {A.his} {B.tie} {B.full}. There {A.he} saw {wish}.
    In the shop, {A} and {A.his} {B.tie} {B.full} saw {wish}. <A happily: {G} would love that!>

    But it cost {price}. {A} had only one little coin.
    <the man in the shop says: I am sorry. It costs {price}.>
    {A} counted {A.his} coins. It was not enough. The {wish.short} cost {price}.

    {A} walked home with {A.his} head down. <a sadly: Now I have no gift.>
    {A} was #sad. {A.He} wanted so much to give {G} something nice.
    <A sadly: I have no money. What can I do?>
    {A} looked at the {wish.short} one last time. Then {A.he} went away with empty hands.

    {B} thought about it. <B asks: Why not make something?>
    <B says: A gift does not have to cost money.>
    {B} shook {B.his} head. <b says: The best gifts are the ones you make.>

    That was a good idea! {A} would give {G.him} {own}. {A.He} {work}.
    So {A} wanted to make {own}. {A.He} {work}.
    {A} ran home. All [morning|afternoon], {A.he} worked on {own}. {A.He} {work}.

    Then it was time. <A says: Happy birthday, {G}! I have {own} for you.>
    In the evening, {A} went to {A.his} {G.role}. <A says: This is my gift for you. It is only {own}.>
    {A} was a little nervous. <A whispers: I have {own} for you.>

    {G} had tears in {G.his} eyes, but {G.he} smiled. <G happily: It is the most beautiful gift of all.>
    {G} smiled and smiled. <G happily: You made it for me? I love it!>
    <G happily: Oh, {A}! Nobody has ever given me such a nice gift.>

    #hug
    {G} put {G.his} arms around {A}.
    Then they all ate #treat together.
    <A asks: Do you like it more than {wish.the}?> {G} laughed. <G answers: Much more!>

    -
    #glad_end
    {A} learned that a gift from the heart is the best gift.
    {A} did not think about the {wish.short} any more.
    """,
)

GONE_ASTRAY = Plot(
    name="lost in a crowd",
    hero="child",
    choices={
        "where, distraction": (
            ("the market", "a man with #number #color balloons"),
            ("the market", "a stand with toys"),
            ("the zoo", "a funny monkey with a long tail"),
            ("the fair", "a horse that went around and around"),
            ("the big shop", "a shelf full of #color teddy bears"),
            ("the train station", "a long #color train"),
            ("the fair", "a woman with a dancing dog"),
        ),
        "helper": (
            "an old woman", "a police officer", "a kind baker", "a tall woman", "a man with a gray beard",
            "a woman with a #color hat", "a man with a big umbrella", "a young mother",
        ),
    },
    text="""
    {When}, {who} went to {where} with {A.his} {G.role}.
    {When}, {who} and {A.his} {G.role} went to {where}.

    There were many people. <G says: Stay close to me, {A}.>
    <G says: Hold my hand. There are so many people here.>
    It was full of people and sounds and smells.

    But then {A} saw {distraction}. {A.He} stopped to look.
    Suddenly, {A} saw {distraction}. {A.He} let go of {A.his} {G.role}'s hand.
    {A} wanted to stay close, but there was {distraction}!

    When {A} turned around, {G} was gone.
    Then {A} looked up. Where was {G}? {A.He} could only see legs and bags.
    {A} looked to the left and to the right. {A.He} could not see {A.his} {G.role}.

    <A cries: {G}! Where are you?> Nobody answered.
    {A} was scared. {A.His} eyes filled with tears.
    All the faces were new. {A}'s heart began to beat fast.
    {A} wanted to run. But then {A.he} remembered what {A.he} had learned: stop, stay and ask.

    {A} stood still, next to a [big tree|wall|#color door|lamp]. {A.He} waited.
    {A} took a deep breath and did not run away.
    <A thinks: I must stay here. {G} will look for me.>
    {A} looked for someone who could help.

    Then {helper} saw {A.him}. <{helper.the} asks: Are you lost, little {A.kind}?>
    {A} saw {helper}. {A.He} went there and said, "Please help me. I am lost."
    {helper.cap} came over and bent down. <{helper.the} kindly: Why are you crying?>

    <A sadly: I cannot find my {G.role}.>
    <A answers: My name is {A}, and I have lost my {G.role}.>
    {A} said {A.his} name, just as {A.he} had learned it.

    <{helper.the} asks: What does {G.he} look like?> <A answers: {G.He} has a #color [coat|hat|bag|shirt].> They
        looked around together.
    <{helper.the} kindly: Do not cry. We will wait here together.>
    {helper.The} took {A} by the hand, and they called as loudly as they could.

    And there {G.he} was! {G} ran to {A} and held {A.him} tight.
    Soon, {A} heard a voice. <G cries: {A}! There you are!>
    Then {A} saw a face in the crowd. <A cries: {G}! {G}! I am here!>

    <G says: I was so worried! You did the right thing. You stayed and asked for help.>
    <A sadly: I am sorry that I let go.> <G kindly: I am so glad that I have you back.>
    {G} thanked {helper.the}. <G says: You are very kind.>

    After that, {A} held on to {A.his} {G.role}'s hand all day.
    On the way home, {A} did not let go one single time.
    -
    #bedtime
    """,
)

TIDY = Plot(
    name="a messy room",
    choices={
        "thing": TOYS,
        "mess": (
            "There were toys and socks and books on the floor",
            "There were blocks everywhere, and nobody could see the floor",
            "The toys were under the bed, and the books were on the chair", "Everything lay in one big pile",
        ),
    },
    text="""
    {When}, {who} was playing in {A.his} room. {mess}.
    {When}, {who} had a very messy room. {mess}.
    {When}, {who} looked for something in {A.his} room. {mess}.

    <G says: {A}, please clean up your room.>
    {G} looked in. <G says: What a mess! Will you clean it up, please?>
    <G says: It is time to put everything away, {A}.>

    <A answers: I do not want to. It is boring.>
    <A answers: Later! I want to play.>
    {A} did not like to clean up. {A.He} sat on the bed and did nothing.

    Then {A} wanted to play with {A.his} {thing.own}. But where {thing.was} {thing.they}?
    Soon, {A} wanted {A.his} {thing.own}, but {A.he} could not see {thing.it} in the mess.
    A little later, {A.his} {B.tie} {B.full} wanted to play with {A}'s {thing.own}. But {A} could not find
        {thing.it}.

    {A} looked [here and there|under the pillow], but the {thing.short} {thing.was} not there. [Ouch!|Oh!] {A.He}
        stepped on a block.
    <A sadly: I will never find my {thing.short} in here!>
    {A.He} looked and looked. {A.He} only found an old sock.

    <G asks: Do you know how to find {thing.it}?> {A} thought for a moment. Then {A.he} nodded.
    <A says: If I clean up, I will find {thing.it}.>
    <G kindly: When every thing has a place, you never have to look for it.>

    So {A} began. The books went on the shelf, and the socks went into the box.
    First, {A} put away the blocks. Then {A.he} put the books on the shelf.
    {A} sang a song and put one thing after the other in its place.

    It was not boring at all. It was like a game.
    One, two, three, and the blocks were back in the box.
    <A says: This goes here, and that goes there.>
    Soon, {A} could see the floor again.
    {G} helped a little, too.

    And under the very last shirt, there {thing.they} {thing.was}: the {thing.own}!
    Then {A} lifted a blanket. There {thing.was} the {thing.own}!
    Behind the box, {A} found {A.his} {thing.own}. <A happily: There {thing.they} {thing.is}!>

    <G happily: What a beautiful room! Well done, {A}.>
    {A} was proud of {A.his} room. Everything looked so nice.
    <A says: Now I know where everything is.>

    Then {A} played with the {thing.short} until #sunset.
    After that, {A} cleaned up every evening.
    #glad_end

    -
    -
    {A} learned to put things back in their place.
    """,
)

SNOW = Plot(
    name="a day in the snow",
    places=("the park", "the garden", "the meadow", "the yard"),
    choices={
        "When": (
            "One winter day", "One winter morning", "One cold morning", "On a cold winter day",
            "Early one winter morning",
        ),
        "nose": ("a carrot", "a red apple", "a long stick", "a pine cone"),
        "eyes": ("two black stones", "two buttons", "two nuts", "two pieces of coal"),
        "clothes": ("a #color hat", "a #color scarf", "an old #color coat/coat"),
        "name_given": ("Mister Snow", "Frosty Nose", "Big White", "Cold Toes", "Snowball"),
    },
    text="""
    {When}, {who} looked out of the window. Everything was white!
    {When}, {who} woke up and saw snow. It was on the trees and on the roofs.
    {When}, {who} ran outside. In the night, a lot of snow had come down.

    <A cries: Snow! Snow! I want to go out!>
    {A} put on {A.his} warm #color [coat|boots|mittens] and went {place.to}.
    The snow was soft and cold. It made a funny sound under {A.his} feet.

    There {A.he} met {A.his} {B.tie} {B.full}. <B says: Let us make a snowman!>
    {A.His} {B.tie} {B.full} was {place.at}, too. <B asks: Shall we build a snowman?>
    #came_by <A says: Help me! I want to make the biggest snowman of all.>

    They rolled a big ball, and then a smaller one, and then a very small one.
    First, they made a little ball of snow. They rolled it and rolled it until it was huge.
    They pushed the snow together with all their might.

    For the nose, they took {nose}. For the eyes, they took {eyes}.
    {A} gave it {nose} for a nose, and {B} found {eyes} for the eyes.
    It got {eyes} for eyes and {nose} for a nose.

    <A says: He looks cold.> So {B} gave him {clothes}.
    {B} ran home and came back with {clothes} for him.
    <B says: Something is missing.> {A} put {clothes} on him.

    <A happily: Now he is done! We will call him {name_given}.>
    They called him {name_given}. He was a fine snowman.
    <B asks: What is his name?> <A answers: His name is {name_given}!>

    They danced around him until their noses were red.
    {A} and {B} slid down the hill on an old box. Whee!
    They caught snowflakes with their tongues.
    Then they threw snowballs and made angels in the snow.
    They sang a song for him. It almost looked as if he smiled.

    Then {G} called them in and gave them hot cocoa. It was nice to be warm.
    When they were cold, {G} made them hot soup.
    At home, {A} put {A.his} wet socks near the fire and had #treat.

    Some days later, the sun came, and {name_given} became smaller and smaller. {A} was sad.
    But after a week, it was warm. Only {nose} and {clothes} were left.
    Every morning, {A} said hello to him. But one day, the snow was gone.

    <G kindly: He is water now, and the water makes the flowers grow. Next winter, he will be back.>
    <B says: We will make him again next year.> {A} smiled.
    {A} kept the {clothes.short} in a box. <a says: This is for next winter.>

    -
    #bedtime
    {A} [could not wait|waited] for the next snow.
    """,
)

RACE = Plot(
    name="a race, and a friend who falls",
    places=("the park", "the farm", "the meadow", "the beach"),
    days=("sunny", "warm", "bright", "windy", "cool"),
    choices={
        "prize": ("a #color ribbon", "a golden cup", "a big #color balloon/balloon", "a shiny medal", "a #color flag"),
        "goal": ("the big rock", "the old tree", "the #color flag", "the gate", "the last fence"),
    },
    text="""
    {When}, {who} was in a race {place.at}. All the others were there, too.
    {When}, {who} went {place.to}. There was a big race!
    {When}, {who} heard about a race {place.at}. <A says: I want to win!>

    The prize was {prize}. {A} wanted it very much.
    The winner would get {prize}. {A} could not wait for the start.
    They had to run to {goal}. The fastest one would get {prize}.

    {A.His} {B.tie} {B.full} stood next to {A.him}. <B says: Good luck, {A}!>
    {B.full}, {A.his} {B.tie}, wanted to run, too. {B.He} was not very fast.
    {A.His} {B.tie} {B.full} was in the race, too. They smiled at each other.

    <G cries: Ready, set, go!>
    One, two, three, go!
    {G} clapped {G.his} hands, and they all began to run.

    {A} ran as fast as the wind. Soon, {A.he} was the first of all.
    {A} ran and ran. There was nobody in front of {A.him}!
    {A}'s feet flew over the {place.ground}. {A.He} was so close to the end.

    Then {A} heard a cry. {B} had fallen down!
    Suddenly, {A} heard a bump. {A.He} looked back. {B} was on the ground and held {B.his} leg.
    But behind {A.him}, {B} fell over a stone. <B cries: Ow! My leg!>

    {A} looked at the end of the race. Then {A.he} looked at {B}. What should {A.he} do?
    <A thinks: If I stop now, I cannot win.>
    {A} could win now. But {B} was hurt.
    The end was so close. But {A} could hear {B} cry.

    {A} turned around and ran back to {B}. <A asks: Are you all right?>
    {A} stopped and went back. <A kindly: Come, I will help you.>
    So {A} ran back and helped {B} up.

    Slowly, they walked to the end together. They were the last of all.
    {B} held on to {A}, and they went on, step by step.
    They came to the end very late, side by side.
    <B says: Run, {A}! You can still win.> <A answers: No. We will go together.>

    But everyone clapped and cheered for them. {G} was very proud.
    <B says: You did not win because of me. I am sorry.> <A answers: You are more important than {prize.the}.>
    <G says: {A} did not win the race, but {A.he} has a big heart.>

    And do you know what? {A} got {prize}, too, for being kind.
    The winner came over and gave the {prize.short} to {A}. <the winner says: This is for you.>
    The next day, {B} gave {A} {prize} made of paper.

    -
    #glad_end
    {A} learned that a friend is more important than a prize.
    """,
)

WISH = Plot(
    name="one wish",
    apart=True,
    choices={
        "magic, finding": (
            ("a golden fish", "It was caught in a net"),
            ("a tiny fairy", "She was stuck in a spider web"),
            ("a talking frog", "He had fallen into a bucket"),
            ("a silver bird", "It was tied to a branch with a string"),
            ("a small #color dragon/dragon", "It had a splinter in its foot"),
            ("a little star", "It had fallen from the sky"),
        ),
        "selfish": (
            "a house made of candy", "a mountain of toys", "a #color pony", "a hundred cakes", "a golden crown",
            "a boat that can fly",
        ),
        "need, fixed": (
            ("{B} was sick and had to stay in bed", "{B} jumped out of bed and was well again"),
            ("{B} had lost {B.his} best #color ball", "the ball lay in front of {B}'s door"),
            ("{B}'s house had a hole in the roof", "{B}'s house had a new #color roof"),
            ("{B} had no warm coat", "{B} had a warm #color coat"),
            ("{B}'s garden was dry and brown", "there were flowers all over {B}'s garden"),
            ("{B} had nobody to play with on {B.his} street", "two new friends came to live next to {B}"),
        ),
    },
    text="""
    {When}, {who} was walking {place.at}.
    {When}, {who} went {place.to} all alone.
    {When}, {who} was {place.at}.

    There, {place.spot}, {A} saw {magic}. {finding}.
    Suddenly, {A} heard a tiny voice {place.spot}. There was {magic}! {finding}.
    {A} saw something shine {place.spot}. It was {magic}! {finding}.

    <the {magic.short} cries: Please help me!> {A} was very gentle and helped right away.
    {A} bent down and helped, as gently as {A.he} could.
    <the {magic.short} sadly: Nobody hears me.> <A kindly: I hear you.> And {A} helped.

    <the {magic.short} says: Thank you! You have one wish. What would you like?>
    <the {magic.short} happily: You are kind. Now I will give you a wish. But only one!>
    <the {magic.short} says: I am magic. Tell me one wish, and it will come true.>

    A wish! {A} thought about {selfish}. That would be wonderful.
    <A thinks: I could wish for {selfish}!>
    {A} wanted to say, "I wish for {selfish}!" {A.He} opened {A.his} mouth.

    But then {A} thought of {A.his} {B.tie} {B.full}. That week, {need}.
    Then {A} remembered {A.his} {B.tie} {B.full}. {A} knew that {need}.
    But {A} stopped. {A.He} had a {B.tie}, {B.full}, and {need}.

    <A says: I do not need anything. Please help {B}.>
    {A} closed {A.his} eyes. <a says: I wish that {B} will be happy again.>
    <A says: There is someone who needs it more than I do. Please help {B}.>
    <A asks: Can I give my wish to {B}?>

    <the {magic.short} says: That is a good wish.> There was a flash of light, and then it was quiet.
    The {magic.short} smiled and turned around three times. Then the {magic.short} was gone.
    Everything was full of #color light for a moment.

    {A} ran to see {B}. And look, {fixed}!
    When {A} came to {B}'s house, {fixed}!
    It was true! That same day, {fixed}.

    <B happily: It is like magic! I am so happy!> {A} only smiled.
    {B} laughed and danced. {A} did not say a word about the wish.
    <B asks: How did that happen?> <A answers: Someone has heard a wish.>

    And sometimes, {place.at}, {A} still sees a little light.
    That night, {A} found a tiny shining stone on {A.his} pillow.
    #glad_end
    {A} learned that the best wish is a wish for someone else.
    """,
)

SICK = Plot(
    name="cheering up a friend",
    apart=True,
    choices={
        "cheer, show": (
            ("a funny story", "told the story with a high voice and a low voice"),
            ("a funny picture", "held the picture up at the window"),
            ("a song", "sang the song with a big hat on"),
            ("a puppet show/show", "made two socks talk to each other"),
            ("a pot of soup/soup", "carried the soup very slowly, so that not a drop fell"),
            ("a bunch of #color flowers/bunch", "put the flowers in a cup of water"),
            ("a #color balloon", "tied the balloon to the bed"),
            ("a silly dance/dance", "danced like a duck, with feet in the air"),
        ),
        "sickness": ("had a cold", "had a sore throat", "had a fever", "had hurt {B.his} leg", "had a bad cough"),
    },
    text="""
    {When}, {who} wanted to play with {A.his} {B.tie} {B.full}.
    {When}, {who} waited for {A.his} {B.tie} {B.full}, but {B.he} did not come.
    {When}, {who} went to see {A.his} {B.tie} {B.full}.

    {B} {sickness} and had to stay in bed.
    <G says: {B} is sick today. {B.He} has to rest.> It was true: {B} {sickness}.
    {B} could not play. {B.He} {sickness}.

    {A} was #sad. {A.He} did not want to play alone.
    <A thinks: Poor {B}! It is boring to be in bed all day.>
    <A asks: Can I do something for {B}, {G}?>
    It was not the same without {B}. {A} sat down and thought.

    Then {A} had an idea. {A.He} would bring {B} {cheer}!
    {A} thought and thought. <a happily: I know! I will bring {B} {cheer}.>
    <G asks: What makes you happy when you are sick?> {A} knew it at once: {cheer}!

    {A} got everything ready. {G} helped {A.him}.
    It took [a little while|all morning], but then it was ready.
    -

    {A} knocked on the door. Knock, knock! <B whispers: Come in.>
    {B} was in bed, with a pale face and a red nose.
    {B} lay under #number blankets and looked out of the window.

    <A says: Look, I have {cheer} for you!> And {A} {show}.
    {A} {show}. {B} sat up to see it better.
    <A kindly: This is for you, {B}.> Then {A} {show}.

    First {B} smiled a little, and then {B.he} laughed out loud.
    {B} began to laugh. <b says: Do not make me laugh so much!>
    A big smile came over {B}'s face. <B happily: I feel better now!>

    {A} stayed until {B} fell asleep.
    <B says: You are the best medicine.> {A} laughed.
    {B} held on to {A}. <b says: Thank you for coming.>
    They talked for a while.
    <B asks: Will you come again?> <A answers: Every day, until you are well.>

    A few days later, {B} was well again, and they ran {place.to} together.
    The next week, {B} could play again. <B happily: Catch me!>
    Soon, {B} was well. And when {A} got a cold, {B} came with {cheer}, too.

    -
    #glad_end
    {A} learned that a smile can help.
    Good friends take care of each other.
    """,
)

SMALL_AND_BIG = Plot(
    name="the smallest one saves the day",
    hero="animal",
    kinds=("mouse", "frog", "squirrel", "hedgehog", "rabbit", "duck"),
    places=("the forest", "the farm", "the pond", "the meadow"),
    choices={
        "task, way": (
            ("a key had fallen into a deep, narrow hole", "climbed down into the hole and came back with the key"),
            ("the door of the barn was locked from the inside", "went in under the door and opened it"),
            ("the rope of the boat had a bad knot", "pulled at the knot, thread by thread, until it was loose"),
            ("a ring was lost in the thick grass", "walked between the blades of grass until {A.he} found the ring"),
            ("the bell on the tower did not ring", "climbed up inside the bell and took out a leaf"),
            ("a baby bird was stuck in a hollow log", "went into the log and led the baby bird out"),
        ),
        "joke": (
            "You are too little", "Go and play with the ants", "This is a job for the big ones", "You cannot help us",
        ),
    },
    text="""
    {When}, {who} wanted to play with the big animals {place.at}.
    {When}, {who} went {place.to}. All the big animals were there.
    {When}, {who} asked the big animals, "Can I play with you?"

    But they laughed. <the big [horse|cow|bear|goat] says: {joke}.>
    <the big [horse|cow|bear|goat] answers: No. {joke}.> The others laughed.

    {A} was #sad. {A.He} sat down {place.spot}.
    <A sadly: Why am I so small?> {A.He} walked away, all alone.
    {A} went home to {A.his} {G.role}. <G kindly: You are small, but you are clever.>

    Then there was a loud cry. Something was wrong: {task}!
    The next day, there was trouble. Everyone could see that {task}.
    But soon, the big animals had a problem, for {task}.

    The [horse|cow|goat] pushed and pulled, but it was no use.
    The big animals tried and tried. They were too big!
    They shouted and ran around. Nobody knew what to do.
    <the big bear says: I am too big for this.> The others were too big, too.

    <A says: Let me try.>
    {A} came closer. <a says: I think that I can do it.>
    <A asks: May I help you?>

    They did not laugh now. They only looked.
    <the [old|wise] donkey says: Why not? Let {A} try.>
    The big animals looked at each other. Then they let {A} come through.

    {A} {way}!
    {A} took a deep breath. Then {A.he} {way}.
    It was not easy, but {A} {way}.

    Everyone cheered for {A}.
    They lifted {A} up high and carried {A.him} around {place}.
    <the old donkey says: Thank you, {A}! You are small, but you are great.>

    <the big bear says: We are sorry that we laughed.>
    They all said sorry. From then on, {A} could always play with them.
    <A happily: Can I play with you now?> <the old donkey answers: Of course!>

    -
    #glad_end
    The big animals learned that small friends can do big things.
    {A} was glad to be just as {A.he} was.
    """,
)

PLOTS = (
    LOST, TOO_HIGH, SHARING, BRAVE, MAKING, HURT_ANIMAL, RAIN, QUARREL, SKILL, SURPRISE, PROMISE, HONESTY, SEED,
    NEW_FRIEND, NIGHT, GREEDY, GIFT, GONE_ASTRAY, TIDY, SNOW, RACE, WISH, SICK, SMALL_AND_BIG,
)
