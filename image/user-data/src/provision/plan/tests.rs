use super::*;
use crate::files::SkipReason;
use crate::provision::samples::{self, user_data};

const OPTIONS: [WithoutInitData; 3] =
    [WithoutInitData::Refuse, WithoutInitData::Dummy, WithoutInitData::UserData];
const APF: (FileName, &str) = (FileName::Apf, "{}");

fn options(without_init_data: WithoutInitData) -> Options {
    Options { without_init_data, require_tpm: false }
}

fn names(set: &FileSet) -> Vec<&'static str> {
    set.files().map(|(name, _)| name.as_str()).collect()
}

fn text(set: &FileSet, name: FileName) -> &str {
    std::str::from_utf8(set.get(name).unwrap()).unwrap()
}

/// The digest of the sample that brings these files.
fn digest(files: &[(&str, &str)]) -> String {
    init_data::decode(&samples::init_data(files)).unwrap().digest
}

#[test]
fn config_counts_only_from_init_data() {
    let evil = FileName::USER_DATA.map(|name| (name, if name == FileName::Apf { "{}" } else { "evil" }));
    let user_data = user_data(&evil, Some(&[("aa.toml", "a"), ("secure-comms.toml", "s")]));
    for choice in OPTIONS {
        let set = plan(&user_data, &Earlier::default(), &options(choice)).unwrap();
        let expected = [
            "apf.json",
            "auth.json",
            "initdata",
            "scratch-space.marker",
            "aa.toml",
            "secure-comms.toml",
            "initdata.toml",
            "initdata.digest",
        ];
        assert_eq!(names(&set), expected);
        assert_eq!(text(&set, FileName::AttestationAgent), "a");
        assert_eq!(text(&set, FileName::SecureComms), "s");
        assert_eq!(
            set.get(FileName::InitData).unwrap(),
            samples::init_data(&[("aa.toml", "a"), ("secure-comms.toml", "s")])
        );
        assert_eq!(text(&set, FileName::InitDataDigest), set.digest());
        assert_eq!(
            set.notes(),
            [
                Note::OnlyFromInitData(FileName::AttestationAgent),
                Note::OnlyFromInitData(FileName::ConfidentialDataHub)
            ]
        );
    }
}

#[test]
fn the_image_fills_in_what_nothing_else_brings() {
    let user_data = user_data(&[APF, (FileName::Auth, "theirs")], Some(&[("aa.toml", "a")]));
    let mut set = plan(&user_data, &Earlier::default(), &options(WithoutInitData::Refuse)).unwrap();
    set.add_default(FileName::Auth, b"image".to_vec());
    set.add_default(FileName::Policy, b"image".to_vec());
    assert_eq!((text(&set, FileName::Auth), text(&set, FileName::Policy)), ("theirs", "image"));
}

#[test]
fn the_policy_counts_only_from_init_data() {
    // Not even if the reader of user data let it pass.
    let evil = [
        APF,
        (FileName::Policy, "evil"),
        (FileName::SecureComms, "evil"),
        (FileName::InitDataDigest, "evil"),
    ];
    for choice in [WithoutInitData::Dummy, WithoutInitData::UserData] {
        let set = plan(&user_data(&evil, None), &Earlier::default(), &options(choice)).unwrap();
        assert_eq!(names(&set), ["apf.json", "initdata", "aa.toml", "initdata.digest"]);
        assert_eq!(set.digest(), init_data::dummy().digest);
    }
}

#[test]
fn init_data_without_aa_toml_get_an_empty_one() {
    let user_data = user_data(&[APF, (FileName::AttestationAgent, "evil")], Some(&[("policy.rego", "p")]));
    let set = plan(&user_data, &Earlier::default(), &Options::default()).unwrap();
    assert_eq!(text(&set, FileName::AttestationAgent), "");
    assert_eq!(set.notes(), [Note::OnlyFromInitData(FileName::AttestationAgent), Note::EmptyAgentConfig]);
}

#[test]
fn without_init_data_the_flag_decides() {
    let user_data =
        user_data(&[APF, (FileName::AttestationAgent, "a"), (FileName::ConfidentialDataHub, "c")], None);
    let run = |choice| plan(&user_data, &Earlier::default(), &options(choice));
    assert_eq!(run(WithoutInitData::Refuse), Err(PlanError::NoInitData));
    let dummy = run(WithoutInitData::Dummy).unwrap();
    assert_eq!(names(&dummy), ["apf.json", "initdata", "aa.toml", "initdata.digest"]);
    assert_eq!(text(&dummy, FileName::AttestationAgent), "");
    assert_eq!(text(&dummy, FileName::InitData), DUMMY);
    let user = run(WithoutInitData::UserData).unwrap();
    assert_eq!(names(&user), ["apf.json", "initdata", "aa.toml", "cdh.toml", "initdata.digest"]);
    assert_eq!(text(&user, FileName::AttestationAgent), "a");
    assert_eq!(
        user.notes(),
        [
            Note::Unmeasured(FileName::AttestationAgent),
            Note::Unmeasured(FileName::ConfidentialDataHub),
            Note::Dummy
        ]
    );
}

#[test]
fn init_data_in_the_directory_count_if_none_came() {
    let earlier = Earlier { init_data: Some(samples::init_data(&[("aa.toml", "old")])), digest: None };
    let set = plan(&user_data(&[APF], None), &earlier, &Options::default()).unwrap();
    assert_eq!(text(&set, FileName::AttestationAgent), "old");
    assert_eq!(set.get(FileName::InitData), earlier.init_data.as_deref());
    assert_eq!(set.notes(), [Note::InitDataFromDirectory]);
    let set = plan(&user_data(&[APF], Some(&[("aa.toml", "new")])), &earlier, &Options::default()).unwrap();
    assert_eq!(text(&set, FileName::AttestationAgent), "new");
    let broken = Earlier { init_data: Some(b"AAAA".to_vec()), digest: None };
    let error = plan(&user_data(&[APF], None), &broken, &options(WithoutInitData::Dummy)).unwrap_err();
    assert!(matches!(error, PlanError::EarlierInitData(_)) && error.is_permanent(), "{error}");
}

#[test]
fn the_dummy_of_an_earlier_run_is_no_init_data() {
    let digest = Some(init_data::dummy().digest.into_bytes());
    let earlier = Earlier { init_data: Some(DUMMY.as_bytes().to_vec()), digest };
    let user_data = user_data(&[APF, (FileName::AttestationAgent, "a")], None);
    let run = |choice| plan(&user_data, &earlier, &options(choice));
    assert_eq!(run(WithoutInitData::Refuse), Err(PlanError::NoInitData));
    assert_eq!(text(&run(WithoutInitData::Dummy).unwrap(), FileName::AttestationAgent), "");
    assert_eq!(text(&run(WithoutInitData::UserData).unwrap(), FileName::AttestationAgent), "a");
}

#[test]
fn other_init_data_in_one_boot_are_refused() {
    let files = [("aa.toml", "a")];
    let run = |digest: &str| {
        let earlier = Earlier { init_data: None, digest: Some(digest.as_bytes().to_vec()) };
        plan(&user_data(&[APF], Some(&files)), &earlier, &Options::default()).map(|_| ())
    };
    assert_eq!(run(&digest(&files)), Ok(()));
    for other in [digest(&[]).as_str(), init_data::dummy().digest.as_str(), ""] {
        assert_eq!(run(other), Err(PlanError::OtherInitData));
    }
    assert!(PlanError::OtherInitData.is_permanent());
}

#[test]
fn broken_init_data_are_an_error_whatever_the_flag() {
    for choice in OPTIONS {
        let user_data = user_data(&[APF, (FileName::InitData, "AAAA")], None);
        let error = plan(&user_data, &Earlier::default(), &options(choice)).unwrap_err();
        assert!(matches!(error, PlanError::InitData(_)), "{error}");
        assert!(error.to_string().starts_with("user data: init-data: "), "{error}");
    }
}

#[test]
fn user_data_without_apf_json_are_refused() {
    let user_data = user_data(&[], Some(&[("aa.toml", "a")]));
    assert_eq!(plan(&user_data, &Earlier::default(), &Options::default()), Err(PlanError::NoApf));
    assert!(!PlanError::NoApf.is_permanent());
}

#[test]
fn of_two_files_with_one_name_the_last_counts() {
    let set =
        plan(&user_data(&[(FileName::Apf, "cut"), APF], Some(&[])), &Earlier::default(), &Options::default());
    assert_eq!(text(&set.unwrap(), FileName::Apf), "{}");
}

#[test]
fn what_was_left_out_is_noted() {
    let skipped = Skipped { line: 7, reason: SkipReason::Path };
    let mut user_data = user_data(&[APF], Some(&[("aa.toml", "a"), ("evil.toml", "secret")]));
    user_data.skipped.push(skipped);
    let set = plan(&user_data, &Earlier::default(), &Options::default()).unwrap();
    let notes: Vec<_> = set.notes().iter().map(ToString::to_string).collect();
    assert_eq!(
        notes,
        [
            "user data: line 7: an item for a path that user data may not write: skipped",
            "init-data: line 6: a file that init-data may not bring: skipped",
        ]
    );
    assert!(!set.files().any(|(_, content)| content == b"secret"));
}

#[test]
fn debug_output_shows_no_content() {
    let user_data = user_data(&[(FileName::Apf, "{\"secret\":1}")], None);
    let set = plan(&user_data, &Earlier::default(), &options(WithoutInitData::Dummy)).unwrap();
    assert!(!format!("{set:?}").contains("secret"));
    let earlier = Earlier { init_data: Some(b"secret".to_vec()), digest: Some(b"secret".to_vec()) };
    assert!(!format!("{earlier:?}").contains("secret"));
}
