use proptest::prelude::*;

use super::*;

fn found(document: &str) -> Result<Vec<(String, String)>, XmlFault> {
    texts(document.as_bytes())
}

fn pair(path: &str, text: &str) -> (String, String) {
    (path.to_owned(), text.to_owned())
}

#[test]
fn a_long_name_is_refused_and_costs_nothing() {
    let text = |name: &str| format!("<{name}>{}</{name}>", "<b/>".repeat(4000));
    assert!(texts(text(&"a".repeat(NAME_MAX)).as_bytes()).is_ok());
    assert_eq!(texts(text(&"a".repeat(NAME_MAX + 1)).as_bytes()), Err(XmlFault::Tag));
}

#[test]
fn texts_are_found_by_their_path() {
    let document = "\u{feff}<?xml version='1.0' encoding='UTF-8'?>\n<!-- a > b -->\n<a:V xmlns:a=\"x>y\" b='&lt;'>\
        <S><V>1 &amp; &#x41;&#66;</V ><V/><V><![CDATA[<![CDATA[&]]></V></S><?pi?></a:V>trash & <";
    let expected = [
        pair("V/S/V", "1 & AB"),
        pair("V/S/V", ""),
        pair("V/S/V", "<![CDATA[&"),
        pair("V/S", ""),
        pair("V", ""),
    ];
    assert_eq!(found(document).unwrap(), expected);
}

#[test]
fn what_is_no_xml_is_refused_by_class() {
    for (document, fault) in [
        ("", XmlFault::NotXml),
        ("hello", XmlFault::NotXml),
        ("hello<a/>", XmlFault::NotXml),
        ("<a>", XmlFault::Cut),
        ("<a><b></b>", XmlFault::Cut),
        ("<a", XmlFault::Cut),
        ("<!-- ", XmlFault::Cut),
        ("<a></b>", XmlFault::Tag),
        ("</a>", XmlFault::Tag),
        ("< a></a>", XmlFault::Tag),
        ("<a<b></a>", XmlFault::Tag),
        ("<!DOCTYPE a [<!ENTITY b 'c'>]><a>&b;</a>", XmlFault::DocType),
        ("<a>&b;</a>", XmlFault::Entity),
        ("<a>&amp</a>", XmlFault::Entity),
        ("<a>&#x0;</a>", XmlFault::Entity),
        ("<a>&#xfffe;</a>", XmlFault::Entity),
        ("<a>\u{1}</a>", XmlFault::Character),
        ("<a>]]></a>", XmlFault::Tag),
        ("<a></</a>", XmlFault::Tag),
        ("<a b></a>", XmlFault::Tag),
        ("<a b=c></a>", XmlFault::Tag),
        ("<a b='<'></a>", XmlFault::Tag),
        ("<a b='&c;'></a>", XmlFault::Entity),
        ("<1/>", XmlFault::Tag),
        ("<? x?><a/>", XmlFault::Tag),
        ("<a><?1?></a>", XmlFault::Tag),
        ("<?xml\tversion='1.1'?><a/>", XmlFault::Version),
        ("<a><?xml encoding='utf-16'?></a>", XmlFault::Encoding),
        ("<a b='c'\u{a0}d='e'/>", XmlFault::Tag),
        ("<!---><a/>", XmlFault::Cut),
        ("<!-- b -- c --><a/>", XmlFault::Tag),
        ("<?xml version='1.1'?><a/>", XmlFault::Version),
        ("<a>&#+65;</a>", XmlFault::Entity),
        ("<a>&#x110000;</a>", XmlFault::Entity),
        ("<?xml version=\"1.0\" encoding=\"utf-16\"?><a/>", XmlFault::Encoding),
    ] {
        assert_eq!(found(document), Err(fault), "{document}");
    }
    assert_eq!(texts(b"<a>\xff</a>"), Err(XmlFault::Encoding));
}

#[test]
fn elements_are_bounded() {
    assert_eq!(found(&"<a>".repeat(100_000)), Err(XmlFault::TooLarge));
    assert_eq!(found(&format!("<a>{}</a>", "<b/>".repeat(ELEMENTS + 1))), Err(XmlFault::TooLarge));
}

proptest! {
    #[test]
    fn an_escaped_text_is_read_as_it_was(text in "[ -~\t\r\né<>&\"']{0,40}") {
        let document = format!("<a>{}</a>", escape(&text));
        prop_assert_eq!(found(&document).unwrap(), [pair("a", &text)]);
    }

    #[test]
    fn no_bytes_are_a_panic(bytes in proptest::collection::vec(prop_oneof![
        Just(b'<'), Just(b'>'), Just(b'/'), Just(b'&'), Just(b';'), Just(b'!'), Just(b'-'), Just(b'"'), any::<u8>()
    ], 0..60)) {
        // Only that it returns counts.
        prop_assert!(texts(&bytes).map_or(true, |texts| !texts.is_empty()));
    }
}
