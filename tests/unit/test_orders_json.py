import json
from decimal import Decimal

import pytest

from sidecar.adapters.gate_http.orders_json import MAX_ORDERS, OrderError, OrderReader
from sidecar.core.orders import Intent, Order, Side

NEW = {"intent": "new", "side": "buy", "quantity": 100}


def read(document) -> list[Order]:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return list(OrderReader(body))


def test_an_order_is_read_with_all_its_keys():
    document = {
        "intent": "replace",
        "symbol": "AAPL",
        "side": "sell",
        "quantity": "0.10",
        "position": -40,
        "open_quantity": 2.5,
        "position_limit": "8e2",
        "reduce_only": True,
    }
    assert read(document) == [
        Order(
            intent=Intent.REPLACE,
            symbol="AAPL",
            side=Side.SELL,
            quantity=Decimal("0.1"),
            position=Decimal(-40),
            open_quantity=Decimal("2.5"),
            position_limit=Decimal(800),
            reduce_only=True,
        )
    ]


def test_decimals_are_exact():
    (order,) = read(b'{"side":"buy","quantity":0.1,"open_quantity":0.2}')
    assert order.quantity + order.open_quantity == Decimal("0.3")


def test_what_is_left_out_has_its_default():
    (order,) = read({"side": "buy", "quantity": 1})
    assert order == Order(intent=Intent.NEW, side=Side.BUY, quantity=Decimal(1))


def test_null_stands_for_left_out_where_that_is_the_stricter_reading():
    (order,) = read(
        {**NEW, "intent": None, "symbol": None, "position": None, "position_limit": None, "reduce_only": None}
    )
    assert order == Order(intent=Intent.NEW, side=Side.BUY, quantity=Decimal(100))


@pytest.mark.parametrize(
    "document",
    [
        {"intent": "cancel"},
        {"intent": "cancel", "quantity": "abc", "side": 7, "order_id": 12345678901234567890123456789012345678901234567},
        {"intent": "cancel", "open_quantity": None, "nested": [{"a": 1}]},
    ],
)
def test_a_cancel_needs_only_its_intent_and_nothing_else_can_stop_it(document):
    assert read(document) == [Order(intent=Intent.CANCEL)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"postion": 5}, "'postion': unknown key; known are intent, symbol"),
        ({"intent": "reduce"}, "intent: 'reduce' is none of new, replace, cancel"),
        ({"intent": "NEW"}, "intent: 'NEW'"),
        ({"intent": ["new"]}, r"intent: \['new'\]"),
        ({"side": "long"}, "side: 'long' is neither buy nor sell"),
        ({"side": None}, "side: None"),
        ({"side": []}, r"side: \[\]"),
        ({"quantity": 0}, "quantity: 0 is not greater than 0"),
        ({"quantity": -1}, "quantity: -1"),
        ({"quantity": True}, "quantity: True is not a number"),
        ({"quantity": None}, "quantity: None"),
        ({"quantity": "1_000"}, "quantity: '1_000'"),
        ({"quantity": " 1"}, "quantity: ' 1'"),
        ({"quantity": "NaN"}, "quantity: 'NaN'"),
        ({"quantity": "Infinity"}, "quantity: 'Infinity'"),
        ({"quantity": "٣"}, "quantity"),
        ({"quantity": ""}, "quantity: ''"),
        ({"quantity": "1e31"}, "quantity: '1e31'"),
        ({"quantity": "1e-31"}, "quantity"),
        ({"quantity": "9" * 41}, "quantity"),
        ({"quantity": int("9" * 41)}, "quantity: 9999"),
        ({"quantity": [1]}, "quantity"),
        ({"position": "long"}, "position: 'long'"),
        ({"position": False}, "position: False"),
        ({"open_quantity": -1}, "open_quantity: -1 is below 0"),
        ({"open_quantity": None}, "open_quantity: None"),
        ({"position_limit": -1}, "position_limit: -1 is below 0"),
        ({"symbol": 5}, "symbol: 5"),
        ({"symbol": "x" * 65}, "symbol"),
        ({"reduce_only": "true"}, "reduce_only: 'true'"),
        ({"reduce_only": 1}, "reduce_only: 1"),
    ],
)
def test_a_malformed_order_is_refused_with_its_place(change, words):
    with pytest.raises(OrderError, match=f"^{words}"):
        read({**NEW, **change})
    with pytest.raises(OrderError, match=r"^\[1\]\." + words):
        read([NEW, {**NEW, **change}])


@pytest.mark.parametrize("missing", ["side", "quantity"])
def test_an_order_needs_side_and_quantity(missing):
    with pytest.raises(OrderError, match=f"{missing}: missing"):
        read({key: value for key, value in NEW.items() if key != missing})


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"5",
        b'"new"',
        b"null",
        b"{",
        b"[",
        b"[]",
        b"[ ]",
        b'[{"intent":"cancel"}',
        b'[{"intent":"cancel"},]',
        b'[{"intent":"cancel"} {"intent":"cancel"}]',
        b'[[{"intent":"cancel"}]]',
        b"[1]",
        b'{"intent":"cancel"} x',
        b'{"intent":"cancel"}{"intent":"cancel"}',
        b'{"intent":"new","intent":"cancel"}',
        b'{"side":"buy","quantity":NaN}',
        b'{"side":"buy","quantity":Infinity}',
        b'{"side":"buy","quantity":1.}',
        b'{"side":"buy","quantity":01}',
        b'{"side":"buy","quantity":1e999999999999999999}',
        b'{"side":"buy\n","quantity":1}',
        b"{'side':'buy'}",
        b"\xff\xfe{}",
        b"\xef\xbb\xbf{}",
        b'{"a":' * 50_000,
        b"[" * 100_000,
        b'{"side":"buy","quantity":' + b"9" * 100_000 + b"}",
    ],
    ids=range(29),
)
def test_a_malformed_body_is_refused(body):
    with pytest.raises(OrderError) as caught:
        read(body)
    assert len(str(caught.value)) < 400


def test_a_list_holds_a_thousand_orders_and_no_more():
    assert len(read([NEW] * MAX_ORDERS)) == MAX_ORDERS
    with pytest.raises(OrderError, match="more than 1000"):
        read([NEW] * (MAX_ORDERS + 1))


def test_white_space_around_is_read_over():
    assert len(read(b' \r\n[ {"intent":"cancel"} ,\t{"intent":"cancel"} ] \n')) == 2
    assert OrderReader(b" [1]").is_list
    assert not OrderReader(b" {}").is_list
