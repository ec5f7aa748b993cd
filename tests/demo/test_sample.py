"""The bundled articles: enough real prose, with the fields of the real data set."""

import json
import re
from collections import Counter

from job.demo.walk import SAMPLE

ARTICLES = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]


def test_sample_has_sixty_articles_and_25_000_characters() -> None:
    assert len(ARTICLES) >= 60
    assert sum(len(article["text"]) for article in ARTICLES) >= 25_000


def test_every_article_has_the_text_fields_of_the_real_data_set() -> None:
    for article in ARTICLES:
        assert list(article) == ["id", "title", "tags", "text"]
        assert all(isinstance(value, str) and value for value in article.values())


def test_ids_and_titles_are_unique_and_tags_are_many() -> None:
    assert (
        len({article["id"] for article in ARTICLES}) == len({article["title"] for article in ARTICLES}) == len(ARTICLES)
    )
    assert len({tag for article in ARTICLES for tag in re.split("[,，]", article["tags"])}) >= 20


def test_no_sentence_is_repeated() -> None:
    sentences = Counter(
        sentence for article in ARTICLES for sentence in re.split("[。！？\n]", article["text"]) if len(sentence) >= 10
    )
    assert [sentence for sentence, times in sentences.items() if times > 1] == []


def test_text_is_chinese_and_stored_as_utf_8() -> None:
    text = "".join(article["text"] for article in ARTICLES)
    assert sum("\u4e00" <= character <= "\u9fff" for character in text) / len(text) > 0.75
    assert "\\u" not in SAMPLE.read_text(encoding="utf-8")
