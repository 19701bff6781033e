//! Tables of the measurements, for the terminal and for the document.

use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, Result};

use super::groups::{Goal, Group, Round, Row};
use super::plot;

/// The tables stand between these two lines of the document.
const BEGIN: &str = "<!-- from here on written by tests/bench -->";
const END: &str = "<!-- written by tests/bench until here -->";

/// One measurement over all rounds.
#[derive(Clone, Copy, Debug)]
pub struct Summary {
    /// The measurement.
    pub row: Row,
    /// Median of ours.
    pub ours: f64,
    /// Median of OpenSSH's.
    pub openssh: f64,
    /// Median of the rounds' ratios, ours to OpenSSH's: a slow round slows both.
    pub ratio: f64,
    /// Least and greatest ratio.
    pub range: [f64; 2],
}

/// Sums up the rounds of a group.
#[must_use]
pub fn summarize(group: &Group, rounds: &[Round]) -> Vec<Summary> {
    let summary = |row: &Row| {
        let ours = sorted(rounds.iter().filter_map(|round| round.ours.get(row.key).copied()));
        let openssh = sorted(rounds.iter().filter_map(|round| round.openssh.get(row.key).copied()));
        let both = |round: &Round| Some(round.ours.get(row.key)? / round.openssh.get(row.key)?);
        let ratios = sorted(rounds.iter().filter_map(both));
        let range = [ratios.first(), ratios.last()].map(|end| end.copied().unwrap_or(f64::NAN));
        Summary { row: *row, ours: median(&ours), openssh: median(&openssh), ratio: median(&ratios), range }
    };
    group.rows.iter().map(summary).collect()
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<_> = values.collect();
    values.sort_unstable_by(f64::total_cmp);
    values
}

fn median(sorted: &[f64]) -> f64 {
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

/// A table in Markdown, which is readable on a terminal, too.
#[must_use]
pub fn table(group: &Group, summaries: &[Summary]) -> String {
    let mut text = format!("### {}\n\n", group.title);
    text += "| measured | unit | ours | OpenSSH | ratio | of all rounds | goal | |\n";
    text += "| --- | --- | ---: | ---: | ---: | --- | --- | --- |\n";
    for summary in summaries {
        let Summary { row, ours, openssh, ratio, range: [least, greatest] } = summary;
        let (goal, verdict) = (goal(row.goal), verdict(row.goal, *ratio));
        // Writing to a string can't fail.
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | **{ratio:.2}** | {least:.2} to {greatest:.2} | {goal} | {verdict} |",
            row.name,
            row.unit,
            figure(*ours),
            figure(*openssh),
        );
    }
    text
}

/// Three significant digits.
fn figure(value: f64) -> String {
    let decimals = if value < 10.0 { 2 } else { usize::from(value < 100.0) };
    format!("{value:.decimals$}")
}

fn goal(goal: Goal) -> String {
    match goal {
        Goal::Least(least) => format!("≥ {least}"),
        Goal::Most(most) => format!("≤ {most}"),
        Goal::MoreIsBetter => "more is better".to_owned(),
        Goal::LessIsBetter => "less is better".to_owned(),
    }
}

fn verdict(goal: Goal, ratio: f64) -> &'static str {
    match goal.reached(ratio) {
        Some(true) => "met",
        Some(false) => "missed",
        None => "",
    }
}

/// Writes the tables into the document, and a picture of each group next to it; `further` is a table without a picture.
///
/// # Errors
/// If the document lacks the two lines, or can't be written.
pub fn write(
    document: &Path,
    about: &str,
    groups: &[(Group, Vec<Summary>)],
    further: Option<&str>,
) -> Result<()> {
    let old = std::fs::read_to_string(document).with_context(|| format!("reading {}", document.display()))?;
    let place = old.split_once(BEGIN).and_then(|(head, rest)| Some((head, rest.split_once(END)?.1)));
    let (head, tail) =
        place.with_context(|| format!("{} lacks the line {BEGIN} or {END}", document.display()))?;
    let mut text = format!("{head}{BEGIN}\n\n{about}\n");
    let pictures = document.with_file_name("benchmarks");
    std::fs::create_dir_all(&pictures)?;
    for (group, summaries) in groups {
        let file = format!("{}.svg", group.name);
        plot::write(&pictures.join(&file), group, summaries)?;
        let _ = write!(text, "{}\n![{}](benchmarks/{file})\n\n", table(group, summaries), group.title);
    }
    if let Some(table) = further {
        let _ = writeln!(text, "{table}");
    }
    text += END;
    text += tail;
    std::fs::write(document, text).with_context(|| format!("writing {}", document.display()))
}

#[cfg(test)]
mod tests {
    use super::super::groups::GROUPS;
    use super::super::measure::Figures;
    use super::*;

    fn rounds(figures: &[(f64, f64)]) -> Vec<Round> {
        let round = |&(ours, openssh)| Round {
            ours: Figures::from([("up 1", ours)]),
            openssh: Figures::from([("up 1", openssh)]),
        };
        figures.iter().map(round).collect()
    }

    #[test]
    fn a_ratio_is_the_median_of_the_rounds_ratios() {
        let summaries = summarize(&GROUPS[0], &rounds(&[(100.0, 50.0), (10.0, 20.0), (90.0, 60.0)]));
        let first = summaries[0];
        assert_eq!((first.ours, first.openssh, first.ratio), (90.0, 50.0, 1.5));
        assert_eq!(first.range, [0.5, 2.0]);
        assert!(table(&GROUPS[0], &summaries).contains("| **1.50** | 0.50 to 2.00 | ≥ 1 | met |"));
    }

    #[test]
    fn new_tables_replace_the_old_ones_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let document = dir.path().join("BENCHMARKS.md");
        std::fs::write(&document, format!("before\n{BEGIN}\nold\n{END}\nafter\n")).unwrap();
        let group = GROUPS[0];
        let summaries = summarize(&group, &rounds(&[(2.0, 1.0)]));
        write(&document, "a machine", &[(group, summaries)], Some("| a cut |\n")).unwrap();
        let text = std::fs::read_to_string(&document).unwrap();
        assert!(text.starts_with("before\n") && text.ends_with("\nafter\n"), "{text}");
        assert!(
            text.contains("a machine")
                && text.contains("| a cut |")
                && text.contains("**2.00**")
                && !text.contains("old"),
            "{text}"
        );
        let picture = std::fs::read_to_string(dir.path().join("benchmarks/bulk.svg")).unwrap();
        assert!(picture.starts_with("<svg") && picture.contains("one stream, to the VM"), "{picture}");
        std::fs::write(&document, "nothing of the kind").unwrap();
        assert!(write(&document, "", &[], None).is_err());
    }
}
