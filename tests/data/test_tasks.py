from rrlhf.data.tasks import KINDS, TOPICS, writing_tasks


def test_no_prompt_is_written_twice():
    texts = [task.text.lower() for task in writing_tasks()]
    assert len(set(texts)) == len(texts) >= 640


def test_every_kind_meets_every_topic_once():
    topics = [topic for group in TOPICS.values() for topic in group]
    pairs = [(task.kind, task.topic) for task in writing_tasks()]
    assert len(set(topics)) == len(topics)
    assert set(pairs) == {(kind, topic) for kind in KINDS for topic in topics}
    assert len(pairs) == len(KINDS) * len(topics)


def test_the_order_never_changes():
    assert writing_tasks() == writing_tasks()
    assert writing_tasks()[0].text == "Write one cheerful sentence about autumn leaves."


def test_a_prompt_is_one_short_sentence_that_names_its_topic():
    for task in writing_tasks():
        assert task.topic in task.text
        assert 1 <= len(task.topic.split()) <= 3
        assert len(task.text.split()) <= 11
        assert task.text.count(".") == 1
        assert task.text.endswith(".")
