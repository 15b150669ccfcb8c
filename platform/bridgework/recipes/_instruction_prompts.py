"""What asks for each of InstructBLIP's tasks: ours, 10 to 15 a task as in the paper; for short answers they say so.

Dai et al. 2023, arXiv:2305.06500, 2.1. {} is what the dataset asks, {ocr} the text in the image, {options} the lettered
candidates of a multiple-choice question.
"""

CAPTION = (
    "A short image description:", "Describe the image in one sentence.", "What does the image show, in short?",
    "A brief caption of the picture:", "Write one line about this photo.", "Tell me briefly what is in the image.",
    "Summarize the picture in a few words.", "Give the image a short caption.", "In short, the picture shows",
    "What would a short caption of this image say?", "Sum up what can be seen here, briefly.",
    "A one-sentence account of the photo:",
)  # fmt: skip
READ = tuple("OCR tokens: {ocr}. " + prompt for prompt in (
    "A short caption that uses the text:", "Describe the image and what is written in it, in short.",
    "What does the picture show, and what does it say? Be brief.", "One sentence about the image and its text:",
    "Caption the picture briefly, reading what stands in it.", "Summarize image and writing in a short sentence.",
    "Write a brief caption that quotes the sign or label.", "In short, what is seen and what can be read?",
    "Tell in one line what the image shows and says.", "A brief description that mentions the words in the image:",
))  # fmt: skip
ANSWER = (
    "{} Short answer:", "Question: {} Short answer:", "Q: {} A:", "Look at the image and answer briefly: {}",
    "Given the image, answer in a word or two: {}", "{} The short answer is", "Question: {} Answer briefly:",
    "Use the picture to answer this question shortly: {}", "What is a short answer to \"{}\"?",
    "{} Reply with as few words as you can.", "Answer the question about the image in short: {}",
    "After a look at the photo, a brief answer to: {}",
)  # fmt: skip
KNOW = (
    "{} Short answer:", "Question: {} Short answer:", "Use what you know to answer briefly: {}",
    "What the image shows and what is common knowledge give a short answer to: {}", "Q: {} A:",
    "{} Think of what you know about such things and answer in short.", "With some knowledge of the world, briefly: {}",
    "Answer in a word or two, though the picture alone may not tell: {}", "{} A well-informed short answer:",
    "Question about the image: {} Short answer from general knowledge:",
)  # fmt: skip
CHOOSE = (
    "{} Options: {options}. Pick the right option.", "Question: {} Options: {options}. Answer with one of the options:",
    "Which option is correct? {} {options}", "{} Options: {options}. The correct option is",
    "Look at the image and choose: {} {options}", "Choose the best of the options. {} {options}",
    "Given the picture, select one option. {} {options}", "{} {options} Choose.",
    "Read the options, then answer with one: {} {options}", "Only one of the options fits the image. {} {options}",
)  # fmt: skip
SIGNS = tuple("OCR tokens: {ocr}. " + prompt for prompt in ANSWER[:10])
ASK = (
    "Given the image, write a question whose answer is: {}.", "What question about the picture is answered by \"{}\"?",
    "The answer is {}. The question about the image:", "Ask something about the photo to which one replies: {}.",
    "Think of a question on this image with the answer {}.", "Answer: {}. Question:",
    "Which question would \"{}\" answer here?", "Make up a question about the image; its answer is {}.",
    "Somebody replied \"{}\". What was asked about the picture?", "A question about the image, answered by {}:",
)  # fmt: skip
TALK: tuple[str, ...] = ()  # LLaVA's instructions stay as they are
