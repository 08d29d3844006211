import pytest

from sidlm.data.tokenizer import Tokenizer, train_tokenizer

TEXT = (
    'system user assistant ipython {"type": "function", "name": "f", "parameters": {}} <function=f> '
    "brave_search.call(query= the cat sat on a mat; naïve café 数学 🎉 def f(x): return x + 1\n\n "
)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT * 3], 400, num_special=16)
