use std::collections::VecDeque;

use super::*;

const DIGEST: &str = "692f2059ebbdf6189c795392d263f2bd0b4020d43e5044b22965424e1670759a";

/// Answers as prepared, and keeps what it was asked.
#[derive(Default)]
struct Script {
    answers: VecDeque<io::Result<Vec<u8>>>,
    commands: Vec<Vec<u8>>,
    pauses: u32,
}

impl Script {
    fn new(answers: impl IntoIterator<Item = Vec<u8>>) -> Self {
        Self { answers: answers.into_iter().map(Ok).collect(), ..Self::default() }
    }
}

impl Tpm for Script {
    fn transact(&mut self, command: &[u8]) -> io::Result<Vec<u8>> {
        self.commands.push(command.to_vec());
        self.answers.pop_front().expect("an answer")
    }

    fn pause(&mut self, _: Duration) {
        self.pauses += 1;
    }
}

fn holds(value: Digest) -> Vec<u8> {
    let mut answer = vec![0x80, 1, 0, 0, 0, 62, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 1, 0, 0x0b, 3, 0, 1, 0];
    answer.extend([0, 0, 0, 1, 0, 32]);
    answer.extend(value);
    answer
}

fn done() -> Vec<u8> {
    vec![0x80, 2, 0, 0, 0, 19, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0]
}

fn refused(code: u32) -> Vec<u8> {
    [&[0x80, 1, 0, 0, 0, 10][..], &code.to_be_bytes()].concat()
}

/// SHA-256 of 32 zeros and the digest, from another program (sha256sum).
fn extended() -> Digest {
    first_32_bytes(EXTENDED).unwrap()
}

const EXTENDED: &str = "157364760bbdf0664167a21f325834a9493158bc5fd5f0b1a8fc492b75e55bd0";

#[test]
fn the_pcr_is_extended_once() {
    let mut tpm = Script::new([holds([0; 32]), done(), holds(extended())]);
    assert_eq!(extend(&mut tpm, DIGEST).unwrap(), Measured::Extended);
    assert_eq!(tpm.commands[1], command::extend(&first_32_bytes(DIGEST).unwrap()));
    let mut again = Script::new([holds(extended())]);
    assert_eq!(extend(&mut again, DIGEST).unwrap(), Measured::Already);
}

#[test]
fn a_longer_digest_counts_by_its_first_32_bytes() {
    for more in [32, 64] {
        let mut tpm = Script::new([holds(extended())]);
        assert_eq!(extend(&mut tpm, &format!("{DIGEST}{}", "f".repeat(more))).unwrap(), Measured::Already);
    }
}

#[test]
fn a_pcr_of_something_else_is_never_extended() {
    let mut tpm = Script::new([holds([1; 32])]);
    assert!(matches!(extend(&mut tpm, DIGEST), Err(PcrError::Taken)));
    assert_eq!(tpm.commands, [command::read()]);
}

#[test]
fn a_yes_without_an_effect_is_an_error() {
    for value in [[0; 32], [1; 32]] {
        let mut tpm = Script::new([holds([0; 32]), done(), holds(value)]);
        assert!(matches!(extend(&mut tpm, DIGEST), Err(PcrError::NotExtended)));
    }
}

#[test]
fn a_busy_tpm_is_asked_again_but_not_endlessly() {
    let mut tpm = Script::new([
        refused(0x90a),
        holds([0; 32]),
        refused(0x922),
        refused(0x908),
        done(),
        holds(extended()),
    ]);
    assert_eq!(extend(&mut tpm, DIGEST).unwrap(), Measured::Extended);
    assert_eq!(tpm.pauses, 3);
    let mut busy = Script::new(std::iter::repeat_n(refused(0x922), 1000));
    let error = extend(&mut busy, DIGEST).unwrap_err();
    assert_eq!(
        error.to_string(),
        "TPM: TPM2_PCR_Read: refused with response code 0x922 (busy for more than 3 s)"
    );
    assert_eq!(busy.commands.len(), 30);
}

#[test]
fn a_tpm_that_refuses_is_an_error() {
    let mut tpm = Script::new([holds([0; 32]), refused(0x907)]);
    let error = extend(&mut tpm, DIGEST).unwrap_err();
    assert!(matches!(error, PcrError::Refused { command: "TPM2_PCR_Extend", code: 0x907 }));
    assert!(
        error.to_string().ends_with("0x907 (locality: PCR 8 can't be extended from the operating system)")
    );
    let mut silent = Script { answers: [Err(io::ErrorKind::TimedOut.into())].into(), ..Script::default() };
    assert!(matches!(extend(&mut silent, DIGEST), Err(PcrError::Transport { .. })));
    let mut garbage = Script::new([vec![0xff; 4096]]);
    assert!(matches!(extend(&mut garbage, DIGEST), Err(PcrError::Response { .. })));
}

#[test]
fn a_text_that_is_no_digest_is_refused_before_the_tpm_is_asked() {
    for digest in ["", &DIGEST[..63], &DIGEST.replace('6', "g"), &DIGEST.replace("69", "é")] {
        let mut tpm = Script::default();
        assert!(matches!(extend(&mut tpm, digest), Err(PcrError::Digest)), "{digest}");
        assert!(tpm.commands.is_empty());
    }
}

fn system(root: &std::path::Path) -> System {
    System {
        class: root.join("class"),
        acpi_table: root.join("TPM2"),
        device: root.join("tpmrm0"),
        looks: 3,
        pause: Duration::ZERO,
    }
}

#[test]
fn a_vm_without_a_tpm_passes_unless_one_is_required() {
    let root = tempfile::tempdir().unwrap();
    let system = system(root.path());
    assert_eq!(measure(&system, DIGEST, false).unwrap(), Measured::NoTpm);
    std::fs::create_dir(&system.class).unwrap();
    assert_eq!(measure(&system, DIGEST, false).unwrap(), Measured::NoTpm);
    assert!(matches!(measure(&system, DIGEST, true), Err(PcrError::Required)));
}

#[test]
fn a_tpm_that_can_not_be_used_is_an_error() {
    let announced = tempfile::tempdir().unwrap();
    let system_announced = system(announced.path());
    std::fs::write(&system_announced.acpi_table, "").unwrap();
    assert!(matches!(measure(&system_announced, DIGEST, false), Err(PcrError::NoDevice(_))));

    let driven = tempfile::tempdir().unwrap();
    let system_driven = system(driven.path());
    std::fs::create_dir_all(system_driven.class.join("tpm0")).unwrap();
    assert!(matches!(measure(&system_driven, DIGEST, false), Err(PcrError::NoDevice(_))));
    std::fs::write(&system_driven.device, "").unwrap();
    let error = measure(&system_driven, DIGEST, false).unwrap_err();
    assert!(matches!(error, PcrError::Open { .. }), "{error}");
    std::fs::remove_file(&system_driven.device).unwrap();
    // A device of another kind: it takes the command and answers with nothing.
    std::os::unix::fs::symlink("/dev/null", &system_driven.device).unwrap();
    assert!(matches!(measure(&system_driven, DIGEST, false), Err(PcrError::Open { .. })));
    let null = System { device: "/dev/null".into(), ..system_driven };
    assert!(matches!(measure(&null, DIGEST, false), Err(PcrError::Response { fault: "cut", .. })));
}

proptest::proptest! {
    #[test]
    fn no_answer_of_a_tpm_is_taken_for_another(
        body in proptest::collection::vec(proptest::num::u8::ANY, 0..70),
        changed in 0_usize..62,
        to in proptest::num::u8::ANY,
    ) {
        // Anything behind a head that fits.
        let size = u32::try_from(body.len() + 10).unwrap();
        let answer = [&[0x80, 1][..], &size.to_be_bytes(), &[0; 4], &body].concat();
        let mut tpm = Script::new([answer]);
        proptest::prop_assert!(extend(&mut tpm, DIGEST).is_err());
        proptest::prop_assert_eq!(tpm.commands.len(), 1);
        // One wrong byte in what says that the PCR was extended: only the update counter may have any value.
        let mut answer = holds(extended());
        let is_same = answer[changed] == to || (10..14).contains(&changed);
        answer[changed] = to;
        let result = extend(&mut Script::new([answer]), DIGEST);
        proptest::prop_assert_eq!(result.is_ok(), is_same, "{}: {:?}", changed, result);
    }
}
