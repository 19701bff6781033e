//! What `nft -j list table` says of our table, reduced to what matters: no handles, no counters.

use serde_json::Value;

use super::{NftError, RulesSettings};

/// The flags of the table, its chains and rules, one a line, in their order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Listing {
    lines: Vec<String>,
    /// Packets that the fence has rejected.
    pub(super) fenced: u64,
}

impl Listing {
    /// What the table should be.
    pub(super) fn expected(settings: RulesSettings) -> Self {
        let RulesSettings { forwarder_port, listen_port } = settings;
        let mut lines = vec![
            "chain to-adaptor: nat output -100 accept".to_owned(),
            "chain fence: filter output 0 accept".to_owned(),
        ];
        for (chain, verdict) in
            [("to-adaptor", format!("redirect {listen_port}")), ("fence", "reject".to_owned())]
        {
            for own in ["ip daddr != 127.0.0.0/8", "ip6 daddr != ::1"] {
                lines.push(format!("{chain}: {own} tcp dport == {forwarder_port} {verdict}"));
            }
        }
        for own in ["ip saddr == 127.0.0.0/8", "ip6 saddr == ::1"] {
            lines.push(format!("fence: {own} tcp sport == {listen_port} ct state in new drop"));
        }
        Self { lines, fenced: 0 }
    }

    /// Reads nft's JSON.
    pub(super) fn parse(json: &[u8]) -> Result<Self, NftError> {
        let failed = |what: &str| NftError::Output(what.to_owned());
        let json: Value = serde_json::from_slice(json).map_err(|error| failed(&error.to_string()))?;
        let objects =
            json.get("nftables").and_then(Value::as_array).ok_or_else(|| failed("no list nftables"))?;
        let (mut lines, mut fenced) = (Vec::new(), 0);
        for object in objects {
            if let Some(chain) = object.get("chain") {
                let [name, kind, hook, priority, policy] =
                    ["name", "type", "hook", "prio", "policy"].map(|key| text(chain.get(key)));
                lines.push(format!("chain {name}: {kind} {hook} {priority} {policy}"));
            } else if let Some(rule) = object.get("rule") {
                let expressions = rule.get("expr").and_then(Value::as_array).map(Vec::as_slice);
                let expressions = expressions.unwrap_or_default();
                let words: Vec<String> = expressions.iter().filter_map(word).collect();
                lines.push(format!("{}: {}", text(rule.get("chain")), words.join(" ")));
                let counted =
                    expressions.iter().filter_map(|one| one.get("counter")?.get("packets")?.as_u64());
                fenced += counted.sum::<u64>();
            } else if let Some(table) = object.get("table") {
                // The rules of one that is dormant do nothing.
                lines.extend(table.get("flags").map(|flags| format!("table: flags {}", text(Some(flags)))));
            } else if object.get("metainfo").is_none() {
                // Sets, maps and the like are not ours.
                lines.push(object.to_string());
            }
        }
        Ok(Self { lines, fenced })
    }

    /// Whether it can be the table that we made: as expected, or, as a version of nft may show it, in another form that has as
    /// many chains and rules, and our ports where they belong.
    pub(super) fn can_be_ours(&self, settings: RulesSettings) -> bool {
        let expected = Self::expected(settings);
        let with = |listing: &Self, port: u16| {
            let is_port = |word: &str| word.parse() == Ok(port);
            let has = |line: &&String| line.split(|c: char| !c.is_ascii_digit()).any(is_port);
            listing.lines.iter().filter(has).count()
        };
        let alike = |port| with(self, port) == with(&expected, port);
        self.difference(&expected).is_none()
            || self.lines.len() == expected.lines.len()
                && alike(settings.forwarder_port)
                && alike(settings.listen_port)
    }

    /// The port to which dials are redirected.
    pub(super) fn redirects_to(&self) -> Option<u16> {
        self.lines.iter().find_map(|line| line.rsplit_once(" redirect ")?.1.parse().ok())
    }

    /// The first difference to `expected`.
    pub(super) fn difference(&self, expected: &Self) -> Option<String> {
        let missing = expected.lines.iter().find(|line| !self.lines.contains(line));
        let strange = self.lines.iter().find(|line| !expected.lines.contains(line));
        match (missing, strange) {
            (Some(missing), _) => Some(format!("'{missing}' is missing")),
            (None, Some(strange)) => Some(format!("'{strange}' is not ours")),
            (None, None) => (self.lines != expected.lines).then(|| "their order differs".to_owned()),
        }
    }
}

/// An expression of a rule; none for a counter.
fn word(expression: &Value) -> Option<String> {
    if expression.get("counter").is_some() {
        return None;
    }
    if let Some(matched) = expression.get("match") {
        let left = |kind: &str, key: &str| matched.get("left")?.get(kind)?.get(key);
        let subject = match left("ct", "key") {
            Some(key) => format!("ct {}", text(Some(key))),
            None => ["protocol", "field"].map(|key| text(left("payload", key))).join(" "),
        };
        let right = matched.get("right");
        let value = match right.and_then(|right| right.get("prefix")) {
            Some(prefix) => format!("{}/{}", text(prefix.get("addr")), text(prefix.get("len"))),
            None => text(right),
        };
        return Some(format!("{subject} {} {value}", text(matched.get("op"))));
    }
    if let Some(redirect) = expression.get("redirect") {
        return Some(format!("redirect {}", text(redirect.get("port"))));
    }
    // How it rejects is not a matter of safety.
    let verdict = ["reject", "drop"].into_iter().find(|verdict| expression.get(verdict).is_some());
    Some(verdict.map_or_else(|| expression.to_string(), str::to_owned))
}

fn text(value: Option<&Value>) -> String {
    match value {
        Some(Value::String(text)) => text.clone(),
        Some(value) => value.to_string(),
        None => "?".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTINGS: RulesSettings = RulesSettings { forwarder_port: 15150, listen_port: 15151 };

    /// As nft 1.0.6 prints it.
    fn printed() -> String {
        let rule = |chain: &str, family: &str, own: &str, rest: &str| {
            format!(
                r#"{{"rule": {{"family": "inet", "table": "secure-comms-adaptor", "chain": "{chain}", "handle": 3, "expr": [
                {{"match": {{"op": "!=", "left": {{"payload": {{"protocol": "{family}", "field": "daddr"}}}}, "right": {own}}}}},
                {{"match": {{"op": "==", "left": {{"payload": {{"protocol": "tcp", "field": "dport"}}}}, "right": 15150}}}},
                {rest}]}}}}"#
            )
        };
        let chain = |name: &str, kind: &str, priority: i32| {
            format!(
                r#"{{"chain": {{"family": "inet", "table": "secure-comms-adaptor", "name": "{name}", "handle": 1,
                "type": "{kind}", "hook": "output", "prio": {priority}, "policy": "accept"}}}}"#
            )
        };
        let v4 = r#"{"prefix": {"addr": "127.0.0.0", "len": 8}}"#;
        let redirect = r#"{"redirect": {"port": 15151}}"#;
        let reject = r#"{"counter": {"packets": 2, "bytes": 80}}, {"reject": {"type": "tcp reset"}}"#;
        let untranslated = |family: &str, own: &str| {
            format!(
                r#"{{"rule": {{"family": "inet", "table": "secure-comms-adaptor", "chain": "fence", "handle": 7, "expr": [
                {{"match": {{"op": "==", "left": {{"payload": {{"protocol": "{family}", "field": "saddr"}}}}, "right": {own}}}}},
                {{"match": {{"op": "==", "left": {{"payload": {{"protocol": "tcp", "field": "sport"}}}}, "right": 15151}}}},
                {{"match": {{"op": "in", "left": {{"ct": {{"key": "state"}}}}, "right": "new"}}}}, {{"drop": null}}]}}}}"#
            )
        };
        let all = [
            r#"{"metainfo": {"version": "1.0.6"}}"#.to_owned(),
            r#"{"table": {"family": "inet", "name": "secure-comms-adaptor", "handle": 2}}"#.to_owned(),
            chain("to-adaptor", "nat", -100),
            chain("fence", "filter", 0),
            rule("to-adaptor", "ip", v4, redirect),
            rule("to-adaptor", "ip6", r#""::1""#, redirect),
            rule("fence", "ip", v4, reject),
            rule("fence", "ip6", r#""::1""#, reject),
            untranslated("ip", v4),
            untranslated("ip6", r#""::1""#),
        ];
        format!(r#"{{"nftables": [{}]}}"#, all.join(","))
    }

    #[test]
    fn what_nft_prints_is_what_is_expected() {
        let listing = Listing::parse(printed().as_bytes()).unwrap();
        assert_eq!(listing.difference(&Listing::expected(SETTINGS)), None);
        assert_eq!(listing.fenced, 4);
    }

    #[test]
    fn each_change_is_a_difference() {
        let expected = Listing::expected(SETTINGS);
        for (from, to, part) in [
            ("15151", "15152", "redirect 15151' is missing"),
            (r#""protocol": "ip6""#, r#""protocol": "ip""#, "ip6 daddr"),
            (r#""len": 8"#, r#""len": 0"#, "127.0.0.0/8"),
            ("\"prio\": -100", "\"prio\": 5", "chain to-adaptor"),
            (r#""reject": {"type": "tcp reset"}"#, r#""accept": null"#, "reject' is missing"),
            (r#""drop": null"#, r#""accept": null"#, "drop' is missing"),
            (r#""right": "new""#, r#""right": "established""#, "ct state in new"),
        ] {
            let json = printed().replace(from, to);
            assert_ne!(json, printed());
            let found = Listing::parse(json.as_bytes()).unwrap().difference(&expected).unwrap();
            assert!(found.contains(part), "{found}");
        }
        let dormant = printed().replace(r#""handle": 2}"#, r#""handle": 2, "flags": "dormant"}"#);
        let found = Listing::parse(dormant.as_bytes()).unwrap().difference(&expected).unwrap();
        assert_eq!(found, "'table: flags dormant' is not ours");
        let mut more = Listing::parse(printed().as_bytes()).unwrap();
        more.lines.push("to-adaptor: accept".to_owned());
        assert!(more.difference(&expected).unwrap().contains("is not ours"));
    }

    #[test]
    fn another_form_can_be_ours_and_other_ports_cannot() {
        let listing = |json: &str| Listing::parse(json.as_bytes()).unwrap();
        assert!(listing(&printed()).can_be_ours(SETTINGS));
        assert_eq!(listing(&printed()).redirects_to(), Some(15151));
        let other_form = printed().replace("\"prio\": -100", "\"prio\": \"dstnat\"");
        assert!(listing(&other_form).can_be_ours(SETTINGS));
        let other_service = printed().replace("15151", "16000");
        assert!(!listing(&other_service).can_be_ours(SETTINGS));
        let mut more = listing(&printed());
        more.lines.push("to-adaptor: accept".to_owned());
        assert!(!more.can_be_ours(SETTINGS));
    }

    #[test]
    fn garbage_is_an_error() {
        for bad in ["", "[]", "{\"nftables\": 1}", "nft: unknown option"] {
            assert!(Listing::parse(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
