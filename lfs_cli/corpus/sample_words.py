"""The words of the built-in stories: who is in them, where they happen, and the sentences that every plot may use.

Everything here is data. `sample.py` explains the notation of the sentences and puts them together.
"""

# fmt: off
# This is a text to read and not code: with every word on a line of its own, it would be three times as long.

# Few enough names that a small model meets each of them often, and learns to keep to one within a story.
GIRLS = ("Anna", "Bella", "Ella", "Hana", "Lily", "Lola", "Lucy", "Maya", "Mia", "Nina", "Rosie", "Sara")
BOYS = ("Ben", "Billy", "Finn", "Jack", "Kenji", "Leo", "Max", "Omar", "Peter", "Sam", "Tim", "Tom")
ANIMAL_GIRLS = ("Coco", "Dot", "Hazel", "Honey", "Lulu", "Penny", "Poppy", "Tilly")
ANIMAL_BOYS = ("Biscuit", "Bruno", "Buddy", "Chip", "Monty", "Otto", "Pip", "Teddy")

CHILD_LOOKS = ("little", "little", "little", "young", "small", "kind", "happy", "cheerful", "clever", "quiet", "funny")
ANIMAL_KINDS = {
    # kind: how it may look
    "bear": ("little", "brown", "small brown", "friendly"),
    "cat": ("little", "gray", "fluffy", "small black", "white"),
    "dog": ("little", "brown", "small white", "playful", "spotted"),
    "duck": ("little", "yellow", "small white", "funny"),
    "fox": ("little", "red", "young", "clever", "quick"),
    "frog": ("little", "green", "small green", "funny"),
    "hedgehog": ("little", "shy", "small brown", "round"),
    "monkey": ("little", "playful", "small brown", "funny"),
    "mouse": ("little", "tiny", "gray", "small white", "clever"),
    "owl": ("little", "young", "brown", "small gray", "fluffy"),
    "pig": ("little", "pink", "round", "happy"),
    "rabbit": ("little", "white", "small brown", "gray", "fluffy"),
    "squirrel": ("little", "red", "small brown", "quick", "playful"),
    "turtle": ("little", "green", "slow", "young", "small green"),
}
GROWN_UPS = (("Mom", "mom", "she"),) * 4 + (("Dad", "dad", "he"),) * 3
GROWN_UPS += (("Grandma", "grandma", "she"),) * 2 + (("Grandpa", "grandpa", "he"),) * 2

PRONOUNS = {
    "she": ("she", "her", "her", "herself"),
    "he": ("he", "him", "his", "himself"),
}

PLACES = {
    # name: (where one is, the ground, places to look, what one may see there)
    "the park": (
        "in", "grass",
        ("under the slide", "behind the big tree", "next to the swings", "under the bench", "near the fence",
         "in the tall grass", "behind the bushes"),
        ("the swings", "the tall trees", "the long slide", "the children on the swings", "the dogs on the grass"),
    ),
    "the garden": (
        "in", "grass",
        ("under the apple tree", "behind the shed", "among the flowers", "next to the gate", "under the old bucket",
         "behind the watering can", "between the rows of carrots"),
        ("the bees on the flowers", "the tall sunflowers", "the red roses", "the fat bees", "the green beans"),
    ),
    "the beach": (
        "on", "sand",
        ("behind a big rock", "under the towel", "next to the boat", "in the sand", "near the water",
         "under the umbrella", "behind the basket"),
        ("the waves", "the white birds", "the little boats", "the crabs in the sand", "the blue sea"),
    ),
    "the forest": (
        "in", "ground",
        ("under a big leaf", "behind an old log", "between the roots of a tree", "next to the stream", "under a bush",
         "behind a mossy stone", "in a pile of leaves"),
        ("the tall trees", "the red mushrooms", "the birds in the trees", "the little stream", "the golden leaves"),
    ),
    "the farm": (
        "on", "ground",
        ("behind the barn", "under the cart", "in the hay", "next to the well", "near the pig pen",
         "behind the red door", "under the old wagon"),
        ("the brown cows", "the fat pigs", "the fluffy sheep", "the hens in the yard", "the big red barn"),
    ),
    "the pond": (
        "at", "grass",
        ("under the little bridge", "behind the reeds", "next to a flat rock", "in the wet grass", "near the old boat",
         "under a willow tree", "behind a log"),
        ("the ducks on the water", "the green frogs", "the tiny fish", "the blue dragonflies", "the lily pads"),
    ),
    "the meadow": (
        "in", "grass",
        ("in the tall grass", "behind a round rock", "under the oak tree", "next to the path", "among the flowers",
         "behind the wooden fence", "near the stream"),
        ("the yellow flowers", "the butterflies", "the busy bees", "the sheep on the hill", "the white clouds"),
    ),
    "the yard": (
        "in", "grass",
        ("under the porch", "behind the fence", "next to the sandbox", "under the swing", "behind the flower pots",
         "near the back door", "in the long grass"),
        ("the birds on the fence", "the ants on the path", "the clothes on the line", "the bugs in the grass"),
    ),
}

WEATHER = {
    # how the day is called: sentences that fit it
    "sunny": (
        "The sun was [warm|bright|shining].", "The sky was [blue|bright and blue].",
        "There was not a cloud in the sky.",
    ),
    "warm": ("The air was [warm|soft and warm].", "The sun felt good on {A.his} face.", "It was nice to be outside."),
    "bright": (
        "The sun was high in the sky.", "The sky was so blue.", "Everything [looked bright|was bright and green].",
    ),
    "windy": ("The wind [blew|sang] in the trees.", "The leaves danced in the wind.", "The clouds ran across the sky."),
    "cool": ("The air was fresh and cool.", "A cool wind blew.", "{A} wore {A.his} warm [coat|sweater]."),
    "cloudy": (
        "Big gray clouds were in the sky.", "The sky was gray, but it was not cold.",
        "There was no sun, but {A} did not mind.",
    ),
}

SPEECH = {
    # manner of speaking: (verb, what follows the speaker)
    "says": (("said", ""),),
    "answers": (("said", ""), ("said", ""), ("answered", ""), ("replied", "")),
    "asks": (("asked", ""),),
    "cries": (("cried", ""), ("shouted", ""), ("said", ""), ("called", "")),
    "sadly": (("said", " sadly"), ("said", " in a small voice"), ("cried", ""), ("said", " softly"), ("said", "")),
    "kindly": (
        ("said", " kindly"), ("said", " softly"), ("said", " gently"), ("said", " in a kind voice"), ("said", ""),
    ),
    "softly": (("said", " softly"), ("whispered", ""), ("said", " quietly")),
    "happily": (("said", " happily"), ("said", " with a big smile"), ("cheered", ""), ("laughed", ""), ("shouted", "")),
    "angrily": (("said", " angrily"), ("shouted", ""), ("yelled", ""), ("said", " in a loud voice")),
    "whispers": (("whispered", ""), ("said", " in a tiny voice"), ("said", " quietly")),
    "thinks": (("thought", ""), ("said to {A.self}", "")),
}
LOUD = ("cheered", "cried", "laughed", "shouted", "yelled")  # how only what ends with ! is said

CONTRACTIONS = {
    # what the sentences say in full, and may say in short before another word
    "I am": "I'm", "I will": "I'll", "it is": "it's", "you are": "you're", "we are": "we're", "we will": "we'll",
    "let us": "let's", "that is": "that's", "what is": "what's", "where is": "where's", "cannot": "can't",
    "do not": "don't", "did not": "didn't", "does not": "doesn't", "could not": "couldn't", "was not": "wasn't",
    "is not": "isn't", "will not": "won't", "had not": "hadn't",
}
PARAPHRASES = {
    # what the sentences say, and may also say in another way
    "began to": ("started to",), "suddenly": ("all at once", "all of a sudden"), "at last": ("finally", "in the end"),
    "soon": ("before long", "a little later", "after a short time"), "right away": ("at once",),
    "after a while": ("after some time", "some time later"),
    "for a long time": ("for a while", "for a long, long time"), "had an idea": ("had a good idea", "had a great idea"),
    "everyone": ("everybody",), "nobody": ("no one",), "oh no": ("oh dear", "oh, no"),
    "a lot of fun": ("so much fun", "lots of fun"), "so proud": ("very proud",), "very proud": ("so proud",),
    "very nice": ("so nice", "lovely"), "so good": ("very good",), "so happy": ("very happy",),
    "ran to": ("hurried to", "rushed to"), "looked around": ("looked all around",), "the next day": ("the day after",),
    "from then on": ("after that", "from that day on"), "from that day on": ("from then on",), "next to": ("beside",),
    "good friend": ("dear friend",), "wanted to help": ("was ready to help",), "felt better": ("was better",),
}

WORDS = {
    "color": ("red", "blue", "green", "yellow", "pink", "orange", "purple", "white", "brown"),
    "size": ("big", "little", "small", "tiny", "round"),
    "happy": ("happy", "very happy", "so happy", "glad", "full of joy", "[happy and proud|proud and happy]"),
    "sad": ("sad", "very sad", "so sad", "unhappy"),
    "number": ("two", "three", "four", "five"),
    "sight": (
        "a #color [bird|butterfly|beetle|flower]", "a [small|fat|tiny|busy] [bee|ant|bug|snail|worm]",
        "#number [small|fat|tiny|busy] [bees|ants|bugs|snails|worms]", "#number #color [birds|butterflies|flowers]",
        "a [gray|black|brown] [cat|squirrel|rabbit]", "an [old man|old woman] with a [big hat|little dog|basket]",
        "a #color [bird|beetle|butterfly] [on a branch|in a tree|on a #color flower]",
        "a [bee|snail] on a #color flower",
        "a cloud like a [big|small] [sheep|boat|fish|hat|bear]", "#number [ants|snails|beetles] on the path",
    ),
    "look_around": (
        "{A} [looked at|loved|liked] {place.view}.", "{A} saw #sight.", "{A} saw #sight and #sight.",
        "{A.He} [saw|could see] #sight on the way.", "There {place.at}, {A} could see {place.view}.", "{day.sky}",
        "{day.sky} {A} [smiled|sang a little song|felt good].", "#Sight_flew.", "#Sight_flew, and {A} [waved|laughed].",
        "{A} stopped to look at {place.view}.", "{A} found a #color [leaf|flower|stone|feather] and kept it.",
        "{A} counted #number #color [birds|flowers|butterflies] and #number [bees|bugs|snails].",
        "{A} sang a [little|happy|silly] song about #sight.", "{A} [waved|said hello] to #sight.",
    ),
    "Sight_flew": (
        "A #color [bird|butterfly] flew by", "#Number #color [birds|butterflies] flew by",
        "A [bee|bird] sang in the sun",
        "Somewhere, a bird was singing", "A [squirrel|rabbit] ran across the path", "#Number ducks walked in a line",
        "A [small|big] dog barked [far away|three times]",
    ),
    "Number": ("Two", "Three", "Four", "Five"),
    "parent": ("{G}", "{G}", "{A.his} {G.role}"),
    "Parent": ("{G}", "{G}", "{A.His} {G.role}"),
    "likes": (
        "sing", "draw", "dance", "run", "jump", "laugh", "read books", "look at the clouds", "play outside", "climb",
        "help {A.his} {G.role}", "listen to stories", "play with {A.his} friends", "ask questions", "paint",
        "count the birds", "look for pretty stones", "tell funny stories", "play hide and seek", "play in the sun",
        "sing silly songs", "build tall towers", "chase butterflies", "swim", "bake with {A.his} {G.role}",
    ),
    "home": (
        "a small house", "a little house near {place}", "a small town", "a tall house", "a little village",
        "a cozy home", "a house with a #color door", "a house on a hill", "a warm little house", "a quiet street",
    ),
    "trait": (
        "brave", "smart", "gentle", "full of ideas", "always busy", "never tired", "always hungry", "good to everyone",
    ),
    "opening": (
        "Once upon a time, there was {A.intro}. {A.He} [loved|liked] to #likes.",
        "Once upon a time, there was {A.intro}. {A.He} [loved|liked] to #likes and to #likes_too.",
        "Once upon a time, there was {A.intro} who [loved|liked] to #likes.",
        "Once upon a time, there was {A.intro}. {A.He} lived in #home with {A.his} {G.role}.",
        "Once upon a time, in #home, there lived {A.intro}. {A.He} was #trait.",
        "Once upon a time, {A.intro} lived in #home.",
        "There was once {A.intro}. {A.He} was [very|always] [brave|busy|friendly|gentle] and [loved|liked] to #likes.",
        "There was {A.intro} who lived in #home.",
        "There once was {A.intro}. Everyone [liked|loved] {A}, for {A.he} was #trait.",
        "{A} was {A.a}. {A.He} lived in #home with {A.his} {G.role}.",
        "{A} was {A.a}. {A.He} was #trait and [loved|liked] to #likes.", "{A} was {A.a} who [loved|liked] to #likes.",
        "{A} lived in #home. {A.He} was {A.a}, and {A.he} [loved|liked] to #likes.",
        "In #home lived {A.intro}. {A.His} {G.role} lived there, too.",
        "{A} and {A.his} {G.role} lived in #home. {A.He} was {A.a} and [loved|liked] to #likes.",
        "Little {A} [loved|liked] to #likes. {A.He} was #trait.",
        "Everyone in the village knew {A}. {A.He} was {A.a} who [loved|liked] to #likes.",
        "{A} was #trait. {A.He} was {A.a}, and {A.he} lived in #home.",
        "This is a story about {A.intro}. {A.He} [loved|liked] to #likes.",
    ),
    "likes_too": (
        "eat apples", "eat cake", "play games", "make things", "go for walks", "wear a #color hat", "sleep late",
        "look at the stars", "pick flowers", "splash in the water", "feed the birds", "roll down hills",
    ),
    "when": (
        "One day", "One day", "One day", "One {day} day", "One {day} morning", "One {day} afternoon", "On a {day} day",
        "One {day} Sunday", "On [Monday|Tuesday|Friday|Saturday|Sunday]", "Early one {day} morning", "Last week",
        "One morning", "After breakfast", "After lunch", "Early in the morning", "Late in the afternoon",
        "Last [summer|spring]",
    ),
    "came_by": (
        "Just then, {A.his} {B.tie} {B.full} came by.", "{B.full}, {A.his} {B.tie}, [saw|heard] {A.him}.",
        "{A.His} {B.tie} {B.full} was [near|close by], and {B.he} came to see.",
        "Soon, {A.his} {B.tie} {B.full} came along.", "Then {A.his} {B.tie} {B.full} walked up to {A.him}.",
        "Just at that moment, {B.full} came around the corner. {B.He} was {A}'s {B.tie}.",
        "{B.full} was {A.his} {B.tie}. {B.He} came closer.", "It was good that {A.his} {B.tie} {B.full} came by.",
    ),
    "whats_wrong": (
        "<B asks: What is wrong?>", "<B asks: Why are you [so sad|crying|sad], {A}?>",
        "<B asks: What happened? Can I help you?>", "<B says: [Hello|Hi], {A}. Are you all right?>",
        "<B kindly: Oh, {A}! Please tell me what is wrong.>", "{B} saw {A}'s face. <b asks: What is the matter?>",
        "<B softly: {A}, you look so sad.>", "<B asks: Can I do something for you, {A}?>",
    ),
    "thanks": (
        "<A happily: Thank you, {B}! You are a [good|great|true|kind] {B.tie}.>",
        "{A} [hugged|thanked] {B} [again and again|and smiled].",
        "<A happily: Thank you so much!> {B} [smiled|laughed]. <B answers: You are welcome.>",
        "{A} gave {B} a big hug. <a says: Thank you for helping me.>",
        "<A says: What would I do without you, {B}?> {B} only smiled.", "{A} was #happy. <a happily: You did it, {B}!>",
    ),
    "until_dark": (
        "They played together until #sunset.",
        "They laughed and played [all day|all afternoon|until it was time to go home].",
        "Then they [ran|walked] home [together|side by side].",
        "They had [so much|a lot of] fun [that day|together].",
        "The rest of the day was [fun|wonderful|full of games].", "Then they sat down and ate #treat.",
        "They told each other funny stories until #sunset.",
        "After that, they [sang|danced|ran|jumped] [in the sun|side by side].",
    ),
    "hug": (
        "#Parent gave {A.him} a [big|warm|long] hug.", "{G} hugged {A}.", "{A} hugged {G} [tight|for a long time].",
        "{G} smiled and held {A} close.", "{G} lifted {A} up and turned around and around.",
        "{G} kissed {A} on the [nose|cheek|head].", "{A} ran to {G} and hugged {G.him}.",
    ),
    "bedtime": (
        "That night, {A} went to bed with a smile.", "That night, {A} slept very well.",
        "That night, {A} dreamed about #dream.", "At bedtime, {A} told {A.his} {G.role} about it all over again.",
        "{A} fell asleep with a smile on {A.his} face.",
    ),
    "glad_end": (
        "{A} was #happy.", "It was [a good|the best|a wonderful|a very good] day.",
        "{A} [smiled|smiled all the way home|could not stop smiling].",
        "{A} [never forgot|always remembered] that day.", "And they were [all|both] happy [again|together].",
        "{A} felt warm and happy inside.", "#bedtime", "#bedtime", "{A} [hummed|sang] a happy song on the way home.",
        "When {A.he} came home, {A} ate #treat and [smiled|told everyone about it].",
        "{A} drew a picture of it and put it on the wall.", "What a [day|good day|wonderful day] it was!",
    ),
    "the_end": ("", "", "", "", "", "", "", "The end."),
    "sunset": ("the sun went down", "it was dark", "the stars came out", "it was time for dinner", "the moon came up"),
    "dream": (
        "the moon and the stars", "{place}", "the day", "a big adventure", "{B}", "cake and flowers",
        "all {A.his} friends",
    ),
    "treat": (
        "a [big|sweet|small] cookie", "a piece of [apple|cherry|carrot] cake", "a red apple", "a slice of warm bread",
        "a bowl of [soup|berries]", "a cup of [hot cocoa|warm milk]", "a sweet pear",
    ),
}
