"""English words that say how a sentence is built and not what it is about: the closed classes.

A latent that is named by one of these, or by a sign of punctuation, is read last.
"""

DETERMINERS = "a an the this that these those each every either neither some any no all both such what which whose"
PRONOUNS = """i me my mine myself you your yours yourself he him his himself she her hers herself it its itself we us
    our ours ourselves they them their theirs themselves one who whom"""
PREPOSITIONS = """about above across after against along among around as at before behind below beneath beside between
    beyond by down during for from in inside into near of off on onto out outside over past through to toward towards
    under until up upon with within without"""
CONJUNCTIONS = """and but or nor so yet if than then because although though while when where whether since unless not
    n't"""
AUXILIARIES = """am is are was were be been being do does did have has had having can could may might must shall should
    will would 's 're 've 'll 'd 'm"""
FUNCTION_WORDS = frozenset(" ".join((DETERMINERS, PRONOUNS, PREPOSITIONS, CONJUNCTIONS, AUXILIARIES)).split())


def is_function_word(word: str) -> bool:
    """Whether a word is of a closed class, or has no letter or digit at all.

    Args:
        word: as a tokenizer writes it, with or without a space before it.
    """
    plain = word.strip().casefold()
    return plain in FUNCTION_WORDS or not any(letter.isalnum() for letter in plain)
