"""The sentences of orders: what is asked, in words, and with which label words it is answered.

A template has two words to answer with, `{yes}` and `{no}`, and one form of the condition:

    {that}        the headline is about sports
    {whether}     is the headline about sports
    {what}        headlines about sports

Templates of orders with four answers have `{list}` instead: red for sports, blue for ...
"""

TWO_WAY = (
    "Answer {yes} if {that}, and {no} if not.",
    "Say {yes} when {that}; otherwise say {no}.",
    "Reply with {yes} for {what} and with {no} for everything else.",
    "Decide: {whether}? If so, write {yes}. If not, write {no}.",
    "Your answer is {yes} whenever {that} and {no} in all other cases.",
    "If {that}, respond {yes}. If it is not so, respond {no}.",
    "For each input: {whether}? {yes} means it is, {no} means it is not. Give that word only.",
    "Mark {what} with {yes}, and all others with {no}.",
    "You are given one text at a time. Output {yes} if {that}, else {no}.",
    "Use the word {no} unless {that}; then use {yes}.",
    "Sort the texts: {what} are {yes}, the rest is {no}.",
    "I want {yes} for {what}. Anything else gets {no}.",
    "Write {no} if it is false that {that}, and {yes} if it is true.",
    "Label every text. {yes}: {what}. {no}: all the others.",
    "Tell me {yes} or {no}. {yes} stands for {what}, {no} for any other text.",
    "Put {what} into the box {yes} and everything else into the box {no}. Name the box.",
    "Read the text and ask yourself: {whether}? Then answer {yes} for a yes and {no} for a no.",
    "One word, please: {yes} where {that}, {no} where not.",
    "{yes} is for {what}; {no} is for what remains.",
    "Only {what} deserve {yes}. Call the others {no}.",
    "Whenever {that}, the reply is {yes}. The reply to anything else is {no}.",
    "We call {what} {yes} here, and we call the rest {no}. What is this one?",
    "Should it happen that {that}, say {yes}; should it not, say {no}.",
    "Give {no} to any text but {what}: those get {yes}.",
    "Check the following: {whether}? Print {yes} in that case and {no} in the opposite case.",
    "The code for {what} is {yes}. The code for other texts is {no}. State the code.",
)
FOUR_WAY = (
    "Answer with one word by topic: {list}.",
    "Which topic has the headline? Say {list}.",
    "Sort headlines by what they are about. Use {list}.",
    "Write {list}.",
    "Reply with a single word: {list}.",
    "Each topic has a word. They are {list}. Give the word of the headline's topic.",
    "You label news: {list}.",
    "Label every headline like this: {list}.",
    "The codes are {list}. State the code of the headline.",
    "Put the headline into a box, {list}, and name the box.",
    "Read the headline and respond {list}.",
    "One word, please: {list}.",
    "Decide what the news is about, then output {list}.",
    "We say {list}. What is this one?",
    "Tell me the topic in our words, {list}.",
    "Mark the headlines with words: {list}.",
    "Find the subject. Your answer is {list}.",
    "Our desks are called {list}. To which desk does the headline go?",
    "Give each headline its word: {list}.",
    "Use these words and no others: {list}.",
    "Print {list}, depending on the topic.",
    "The reply depends on the subject: {list}.",
    "One text, one topic, one word: {list}.",
    "Name what the headline belongs to. We write {list}.",
    "Answer as agreed, {list}.",
    "Here is the key: {list}. Apply it to the headline.",
)
HELD = 6  # the last templates of each kind are never trained on

# Attribute: its source, the labels of the source that it holds for, and its conditions in words.
NEWS, FILM, THING = "agnews", "sst2", "dbpedia"


def about(*topics):
    return tuple(
        (f"the headline is about {topic}", f"is the headline about {topic}",
         f"headlines about {topic}")
        for topic in topics
    ) + tuple(
        (f"the news is on {topic}", f"is this news on {topic}", f"news on {topic}")
        for topic in topics
    )  # fmt: skip


def kind(one, many):
    return (
        (f"the text describes {one}", f"does the text describe {one}", f"descriptions of {many}"),
        (f"it is about {one}", f"is it about {one}", f"texts about {many}"),
        (f"the thing described is {one}", f"is the thing described {one}", f"texts on {many}"),
    )


ATTRIBUTES = {
    "sports": (NEWS, "Sports", about("sports", "a game, a team or an athlete")),
    "business": (NEWS, "Business", about("business", "companies and the economy")),
    "technology": (
        NEWS,
        "Science or Technology",
        about("science or technology", "computers, space or research"),
    ),
    "world": (NEWS, "World", about("world politics", "conflicts, governments or elections")),
    "praise": (
        FILM,
        "Good",
        (
            ("the critic likes the film", "does the critic like the film", "good reviews"),
            ("the remark is praise", "is the remark praise", "remarks that praise"),
            ("the words are kind to the film", "are the words kind", "favorable words"),
            ("the opinion is positive", "is the opinion positive", "positive opinions"),
        ),
    ),
    "blame": (
        FILM,
        "Bad",
        (
            ("the critic dislikes the film", "does the critic dislike it", "bad reviews"),
            ("the remark is a complaint", "is the remark a complaint", "remarks that complain"),
            ("the opinion is negative", "is the opinion negative", "negative opinions"),
        ),
    ),
    "plant": (THING, "Plant", kind("a plant", "plants")),
    "company": (THING, "Company", kind("a company", "companies")),
    "album": (THING, "Album", kind("a music album", "music albums")),
    "film": (THING, "Film", kind("a film", "films")),
    "athlete": (THING, "Athlete", kind("an athlete", "athletes")),
    "building": (THING, "Building", kind("a building", "buildings")),
    "place": (THING, "Natural Place", kind("a river, lake or mountain", "rivers and mountains")),
    "animal": (THING, "Animal", kind("an animal", "animals")),
}
TOPIC = "topic"  # the attribute with four answers
TOPICS = {
    "Sports": ("sports", "sport", "games and athletes"),
    "Business": ("business", "the economy", "companies and markets"),
    "Science or Technology": ("science or technology", "technology", "computers and research"),
    "World": ("world politics", "world affairs", "governments and conflicts"),
}
UNSEEN_ATTRIBUTE = "animal"

PAIRS = (
    ("tick", "cross"), ("red", "blue"), ("north", "south"), ("cat", "dog"), ("up", "down"),
    ("left", "right"), ("gold", "silver"), ("apple", "pear"), ("sun", "moon"), ("river", "hill"),
    ("king", "queen"), ("fox", "owl"), ("iron", "wood"), ("rose", "lily"), ("one", "two"),
    ("alpha", "beta"), ("cup", "plate"), ("door", "window"), ("tea", "coffee"), ("day", "night"),
    ("bread", "butter"), ("salt", "pepper"), ("circle", "square"), ("hand", "foot"),
    ("ship", "train"), ("piano", "drum"),
)  # fmt: skip
UNSEEN_PAIRS = (("fox", "owl"), ("cup", "plate"))
FOURS = (
    ("spring", "summer", "autumn", "winter"), ("green", "yellow", "black", "white"),
    ("three", "four", "five", "six"), ("lion", "horse", "sheep", "goat"),
    ("oak", "pine", "birch", "maple"), ("copper", "tin", "lead", "zinc"),
)  # fmt: skip
