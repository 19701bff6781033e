//! Compares Secure Comms with stock OpenSSH in one run; `tests/bench` builds what this needs and calls it.
//!
//! `bench [--short] [--write DOCUMENT] [--cuts N] [--max SECONDS] [--pods N] [GROUP...]`. The agent is that of `SECURE_COMMS_BIN_DIR`, as in the tests. Every
//! byte is compared; a wrong byte is an error, a slow one is not. A stream that a cut ends is an error, too.

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use secure_comms_tests::bench::control;
use secure_comms_tests::bench::cuts::{self, Cuts};
use secure_comms_tests::bench::groups::{Amount, GROUPS, Group};
use secure_comms_tests::bench::node::{self, Node};
use secure_comms_tests::bench::tables;
use secure_comms_tests::harness::process::ensure_built;
use secure_comms_tests::usage::is_help;

const USAGE: &str =
    "usage: bench [--short] [--write DOCUMENT] [--cuts N] [--max SECONDS] [--pods N] [GROUP...]";
/// Group of its own: OpenSSH is no contender in it.
const CUTS: &str = "cuts";
/// As that, and by name only: it starts hundreds of programs.
const NODE: &str = "node";
const FULL: Amount = Amount { rounds: 5, counted: Duration::from_millis(1500), requests: 3000 };
/// Enough to check that every measurement works; the figures mean little.
const SHORT: Amount = Amount { rounds: 1, counted: Duration::from_millis(300), requests: 200 };

struct Arguments {
    amount: Amount,
    document: Option<PathBuf>,
    groups: Vec<Group>,
    cuts: Option<Cuts>,
    node: Option<Node>,
}

fn main() -> ExitCode {
    let mut words = std::env::args_os().skip(1);
    if words.next().is_some_and(|word| word == control::ARGUMENT) {
        let socket = PathBuf::from(words.next().unwrap_or_default());
        return ended(control::run(&socket));
    }
    compare()
}

#[tokio::main]
async fn compare() -> ExitCode {
    if is_help(USAGE) {
        return ExitCode::SUCCESS;
    }
    let arguments = match arguments(std::env::args().skip(1)) {
        Ok(arguments) => arguments,
        Err(fault) => {
            eprintln!("bench: {fault}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    ended(run(arguments).await)
}

fn ended(result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn arguments(mut words: impl Iterator<Item = String>) -> Result<Arguments, String> {
    let mut arguments =
        Arguments { amount: FULL, document: None, groups: Vec::new(), cuts: None, node: None };
    let (mut cuts, mut asks_for_cuts) = (cuts::DEFAULT, false);
    let (mut node, mut asks_for_node) = (node::DEFAULT, false);
    while let Some(word) = words.next() {
        match word.as_str() {
            "--short" => arguments.amount = SHORT,
            "--write" => arguments.document = Some(words.next().ok_or("--write wants a file")?.into()),
            "--cuts" => cuts.count = number(&word, words.next())?,
            "--max" => cuts.longest = Duration::from_secs(number(&word, words.next())?),
            "--pods" => node.pods = number(&word, words.next())?,
            CUTS => asks_for_cuts = true,
            NODE => asks_for_node = true,
            name => {
                let group = GROUPS.into_iter().find(|group| group.name == name);
                let names = || GROUPS.map(|group| group.name).join(", ") + ", " + CUTS + ", " + NODE;
                arguments
                    .groups
                    .push(group.ok_or_else(|| format!("no group {name:?}; there are {}", names()))?);
            }
        }
    }
    if arguments.groups.is_empty() && !asks_for_cuts && !asks_for_node {
        arguments.groups = GROUPS.to_vec();
        asks_for_cuts = true;
    }
    arguments.cuts = asks_for_cuts.then_some(cuts);
    arguments.node = asks_for_node.then_some(node);
    if arguments.document.is_some() && (arguments.groups.len() < GROUPS.len() || !asks_for_cuts) {
        return Err("--write wants all groups: a document has one run's figures".to_owned());
    }
    Ok(arguments)
}

fn number<T: FromStr>(option: &str, word: Option<String>) -> Result<T, String> {
    word.and_then(|word| word.parse().ok()).ok_or_else(|| format!("{option} wants a number"))
}

async fn run(arguments: Arguments) -> Result<()> {
    let about = about(arguments.amount).await?;
    println!("{about}");
    let mut measured = Vec::new();
    for group in arguments.groups {
        let rounds = group.run(arguments.amount).await?;
        let summaries = tables::summarize(&group, &rounds);
        println!("{}", tables::table(&group, &summaries));
        measured.push((group, summaries));
    }
    if let Some(node) = arguments.node {
        println!("{}", node.run().await.context(NODE)?.table());
    }
    let mut cuts_table = None;
    if let Some(cuts) = arguments.cuts {
        let measured = cuts.run().await.context(CUTS)?;
        let table = measured.table(cuts);
        println!("{table}");
        ensure!(measured.is_good(), "{CUTS}: streams were lost");
        cuts_table = Some(table);
    }
    match arguments.document {
        Some(document) => tables::write(&document, &about, &measured, cuts_table.as_deref()),
        None => Ok(()),
    }
}

/// Machine, versions and amounts, without which the figures mean nothing.
async fn about(amount: Amount) -> Result<String> {
    let binaries = ensure_built().await?;
    let size = std::fs::metadata(&binaries.agent)?.len();
    let cpu = std::fs::read_to_string("/proc/cpuinfo")?;
    let cpu = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let (cpu, cores) =
        (cpu.map_or("unknown processor", |(_, name)| name), std::thread::available_parallelism()?);
    let (kernel, date) = (said("uname", &["-sr"])?, said("date", &["-u", "+%F %R UTC"])?);
    // ssh prints its version to standard error, with other words before it.
    let openssh = said("ssh", &["-V"])?;
    let agent = said(&binaries.agent.display().to_string(), &["-version"])?;
    Ok(format!(
        "{date}; {cpu}, {cores} cores; {kernel}; {agent} ({size} bytes); {openssh}. {} rounds, bulk data counted for {} ms \
         each, {} requests each.\n",
        amount.rounds,
        amount.counted.as_millis(),
        amount.requests,
    ))
}

/// First line that a program prints, on either output.
fn said(program: &str, arguments: &[&str]) -> Result<String> {
    let output =
        Command::new(program).args(arguments).output().with_context(|| format!("running {program}"))?;
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    text.lines().next().map(str::to_owned).with_context(|| format!("{program} printed nothing"))
}
