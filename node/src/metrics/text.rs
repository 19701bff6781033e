//! The text of metrics, in the two forms that Prometheus reads.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};

use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::registry::Registry;

/// A form of the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// OpenMetrics 1.0.
    OpenMetrics,
    /// Prometheus's own, version 0.0.4.
    Prometheus,
}

impl Form {
    /// The form that a client asks for. Prometheus names OpenMetrics; what names nothing understands the older one.
    pub(super) fn accepted(accept: Option<&str>) -> Self {
        let names = |accept: &str| {
            accept.split(',').any(|range| {
                let mut parts = range.split(';').map(str::trim);
                let is_it = parts
                    .next()
                    .is_some_and(|kind| kind.eq_ignore_ascii_case("application/openmetrics-text"));
                is_it && !parts.any(|part| matches!(part, "q=0" | "q=0.0"))
            })
        };
        if accept.is_some_and(names) { Self::OpenMetrics } else { Self::Prometheus }
    }

    pub(super) fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

pub(super) fn encode(form: Form, registries: &[&Registry]) -> Result<String, fmt::Error> {
    let mut text = String::new();
    for registry in registries {
        encode_registry(&mut text, registry)?;
    }
    match form {
        Form::OpenMetrics => encode_eof(&mut text)?,
        Form::Prometheus => text = older(&text)?,
    }
    Ok(text)
}

/// The older form knows no units and no type `info`, and names a family as its samples.
fn older(text: &str) -> Result<String, fmt::Error> {
    let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
    let renamed: BTreeMap<&str, (String, &str)> = types
        .filter_map(|(name, kind)| match kind {
            "counter" => Some((name, (format!("{name}_total"), "counter"))),
            "info" => Some((name, (format!("{name}_info"), "gauge"))),
            _ => None,
        })
        .collect();
    let mut older = String::with_capacity(text.len());
    for line in text.lines() {
        let described = line.strip_prefix("# ").and_then(|rest| {
            let (keyword, rest) = rest.split_once(' ')?;
            let (name, rest) = rest.split_once(' ')?;
            Some((keyword, name, rest))
        });
        match described {
            Some(("UNIT", ..)) => {}
            Some((keyword, name, rest)) => {
                let (name, kind) =
                    renamed.get(name).map_or((name, rest), |(name, kind)| (name.as_str(), *kind));
                writeln!(older, "# {keyword} {name} {}", if keyword == "TYPE" { kind } else { rest })?;
            }
            None => writeln!(older, "{line}")?,
        }
    }
    Ok(older)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_gets_the_form_that_it_names() {
        let prometheus =
            "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.1";
        assert_eq!(Form::accepted(Some(prometheus)), Form::OpenMetrics);
        for other in
            [None, Some("*/*"), Some("text/plain"), Some("application/openmetrics-text;q=0"), Some("")]
        {
            assert_eq!(Form::accepted(other), Form::Prometheus, "{other:?}");
        }
    }

    #[test]
    fn the_older_form_names_families_as_their_samples() {
        let text = "# HELP a_b Of b.\n# TYPE a_b counter\na_b_total 1\n# HELP c x # TYPE d counter\n# TYPE c info\nc_info{v=\"1\"} 1\n\
                    # HELP s S.\n# TYPE s gauge\n# UNIT s seconds\ns 2\n";
        assert_eq!(
            older(text).unwrap(),
            "# HELP a_b_total Of b.\n# TYPE a_b_total counter\na_b_total 1\n# HELP c_info x # TYPE d counter\n\
             # TYPE c_info gauge\nc_info{v=\"1\"} 1\n# HELP s S.\n# TYPE s gauge\ns 2\n"
        );
    }
}
