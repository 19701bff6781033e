//! Which files a VM gets from its user data and its init-data.
//!
//! What is measured decides. Init-data are bound to the evidence by their digest, user data are not: so the configuration of the
//! guest components, the policy and the settings of Secure Comms come from init-data alone.

use std::collections::BTreeMap;
use std::fmt;

use super::{Options, WithoutInitData, json};
use crate::files::{FileName, InitData, UserData};

/// The init-data that upstream makes for a pod without: an empty aa.toml.
pub const DUMMY: &[u8] = b"H4sIAAAAAAAA/0rMSc8vyizJyFWwVVAqzkg0MjVT4ipLLSrOzM8DCRnoGeoZKHFxRackliTGciklJuqV\
5OfmKCnYKqirq3Opq6sDAgAA//8lc7IOQgAAAA==";
/// Their digest.
pub const DUMMY_DIGEST: &str = "adb48cc14fea9403d3d51f3b5f5068fd4d80445a14e94f1b3d5dbabaad66478d";

/// What an earlier run, or cloud-init, left in the directory.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Earlier {
    /// Its `initdata`.
    pub init_data: Option<Vec<u8>>,
    /// Its `initdata.digest`: what this boot's evidence covers already.
    pub digest: Option<Vec<u8>>,
}

/// All files of one run, checked. What is not in it is removed from the directory.
#[derive(Clone, PartialEq, Eq)]
pub struct FileSet {
    files: BTreeMap<FileName, Vec<u8>>,
    digest: String,
    notes: Vec<Note>,
}

/// Something the operator should know about a set that is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Note {
    /// A file of the user data that only init-data may bring.
    OnlyFromInitData(FileName),
    /// A file of the user data that no evidence covers is used.
    Unmeasured(FileName),
    /// The init-data bring no aa.toml.
    EmptyAgentConfig,
    /// User data bring no init-data, but they are in the directory.
    InitDataFromDirectory,
    /// No init-data came; [`DUMMY`] is used.
    Dummy,
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OnlyFromInitData(name) => write!(
                f,
                "user data: {}: not used, the cloud could change it unseen; put it into the pod's init-data",
                name.as_str()
            ),
            Self::Unmeasured(name) => write!(
                f,
                "user data: {}: used though no evidence covers it, as --without-init-data user-data says",
                name.as_str()
            ),
            Self::EmptyAgentConfig => f.write_str(
                "init-data: no aa.toml: writing an empty one, so that the attestation agent starts with its defaults",
            ),
            Self::InitDataFromDirectory => {
                f.write_str("user data: no init-data: using the file initdata that is in the directory")
            }
            Self::Dummy => f.write_str("no init-data: writing the default ones, as --without-init-data says"),
        }
    }
}

/// Why nothing can be written. No text quotes a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// User data without the agent's config.
    #[error("user data: no apf.json; check that this VM was started by cloud-api-adaptor")]
    NoApf,
    /// A JSON file that is cut or not JSON.
    #[error("user data: {}: not a complete JSON object; check the size limit of the cloud", .0.as_str())]
    NotJson(FileName),
    /// No init-data, and the image wants them.
    #[error(
        "user data: no init-data; give the pod init-data, or start an image with --without-init-data dummy for pods without"
    )]
    NoInitData,
    /// The digest is not what [`InitData`] promises.
    #[error("init-data: the digest is not 64, 96 or 128 lower-case hex digits")]
    Digest,
    /// Other init-data were written in this boot.
    #[error("init-data: not those of an earlier run in this boot, which the evidence covers; restart the VM")]
    OtherInitData,
}

impl PlanError {
    /// Whether more than a few tries can't help: a text that was cut may be whole the next time, this one is whole.
    pub fn is_permanent(&self) -> bool {
        matches!(self, Self::NoInitData | Self::Digest | Self::OtherInitData)
    }
}

/// Checks what user data must bring, whatever the init-data are: a complete apf.json, and no other JSON file that was cut.
///
/// # Errors
/// [`PlanError::NoApf`] and [`PlanError::NotJson`].
pub fn check(user_data: &UserData) -> Result<(), PlanError> {
    last(user_data, FileName::Apf).ok_or(PlanError::NoApf)?;
    for name in [FileName::Apf, FileName::Auth] {
        if last(user_data, name).is_some_and(|content| !json::is_object(content)) {
            return Err(PlanError::NotJson(name));
        }
    }
    Ok(())
}

/// The init-data that count, in base64: those of the user data, else those in the directory. [`DUMMY`] in the directory is what an
/// earlier run made, so it is as if none were there.
pub fn raw_init_data<'a>(user_data: &'a UserData, earlier: &'a Earlier) -> Option<&'a [u8]> {
    last(user_data, FileName::InitData).or_else(|| earlier.init_data.as_deref().filter(|raw| *raw != DUMMY))
}

/// Decides over each file. `init_data` is what [`raw_init_data`] decodes to.
///
/// # Errors
/// The first fault; then nothing may be written.
pub fn plan(
    user_data: &UserData,
    init_data: Option<InitData>,
    earlier: &Earlier,
    options: &Options,
) -> Result<FileSet, PlanError> {
    check(user_data)?;
    let mut set = FileSet { files: BTreeMap::new(), digest: String::new(), notes: Vec::new() };
    set.take_unmeasured(user_data);
    match (init_data, raw_init_data(user_data, earlier)) {
        (Some(init_data), Some(raw)) => {
            if last(user_data, FileName::InitData).is_none() {
                set.notes.push(Note::InitDataFromDirectory);
            }
            set.ignore_config(user_data);
            set.take_init_data(init_data, raw);
        }
        _ => match options.without_init_data {
            WithoutInitData::Refuse => return Err(PlanError::NoInitData),
            WithoutInitData::Dummy => {
                set.ignore_config(user_data);
                set.take_dummy();
            }
            WithoutInitData::UserData => {
                set.take_config(user_data);
                set.take_dummy();
            }
        },
    }
    set.seal(earlier)
}

impl FileSet {
    /// Each file with its content.
    pub fn files(&self) -> impl Iterator<Item = (FileName, &[u8])> {
        self.files.iter().map(|(name, content)| (*name, content.as_slice()))
    }

    /// The digest of the init-data, in lower-case hex.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// What the operator should know; one line of the log each.
    pub fn notes(&self) -> &[Note] {
        &self.notes
    }

    /// The content of a file, if it is in the set.
    pub(super) fn get(&self, name: FileName) -> Option<&[u8]> {
        self.files.get(&name).map(Vec::as_slice)
    }

    /// Files that decide nothing over trust: what the agent believes of apf.json is its own question.
    fn take_unmeasured(&mut self, user_data: &UserData) {
        for name in [FileName::Apf, FileName::Auth, FileName::ScratchSpaceMarker] {
            if let Some(content) = last(user_data, name) {
                self.files.insert(name, content.to_vec());
            }
        }
        for name in ONLY_MEASURED {
            if last(user_data, name).is_some() {
                self.notes.push(Note::OnlyFromInitData(name));
            }
        }
    }

    fn ignore_config(&mut self, user_data: &UserData) {
        let there = CONFIG.into_iter().filter(|name| last(user_data, *name).is_some());
        self.notes.extend(there.map(Note::OnlyFromInitData));
    }

    fn take_config(&mut self, user_data: &UserData) {
        for name in CONFIG {
            if let Some(content) = last(user_data, name) {
                self.files.insert(name, content.to_vec());
                self.notes.push(Note::Unmeasured(name));
            }
        }
    }

    fn take_init_data(&mut self, init_data: InitData, raw: &[u8]) {
        self.files.insert(FileName::InitData, raw.to_vec());
        self.files.insert(FileName::InitDataToml, init_data.toml);
        self.digest = init_data.digest;
        for (name, content) in init_data.files {
            if CONFIG.contains(&name) || MEASURED.contains(&name) {
                self.files.insert(name, content);
            }
        }
        // Upstream's units wait for this file and say nothing while it is missing. That the init-data have none is measured too, so
        // its absence decides the same as an empty file: the agent's defaults.
        if !self.files.contains_key(&FileName::AttestationAgent) {
            self.files.insert(FileName::AttestationAgent, Vec::new());
            self.notes.push(Note::EmptyAgentConfig);
        }
    }

    /// No `initdata.toml`: the attestation agent claims no init-data that the VM never got, as upstream's does not.
    fn take_dummy(&mut self) {
        self.files.insert(FileName::InitData, DUMMY.to_vec());
        self.digest = DUMMY_DIGEST.to_owned();
        self.files.entry(FileName::AttestationAgent).or_default();
        self.notes.push(Note::Dummy);
    }

    fn seal(mut self, earlier: &Earlier) -> Result<Self, PlanError> {
        let hex = self.digest.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        if !hex || ![64, 96, 128].contains(&self.digest.len()) {
            return Err(PlanError::Digest);
        }
        if earlier.digest.as_ref().is_some_and(|earlier| earlier != self.digest.as_bytes()) {
            return Err(PlanError::OtherInitData);
        }
        self.files.insert(FileName::InitDataDigest, self.digest.clone().into_bytes());
        Ok(self)
    }
}

/// Names and sizes: contents may be credentials.
impl fmt::Debug for FileSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sizes = self.files.iter().map(|(name, content)| (name.as_str(), content.len()));
        f.debug_map().entries(sizes).finish()
    }
}

/// Sizes only.
impl fmt::Debug for Earlier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let size = |content: &Option<Vec<u8>>| content.as_ref().map(Vec::len);
        write!(f, "Earlier {{ init_data: {:?}, digest: {:?} }}", size(&self.init_data), size(&self.digest))
    }
}

/// Configuration of the guest components: from user data only by a measured flag.
const CONFIG: [FileName; 2] = [FileName::AttestationAgent, FileName::ConfidentialDataHub];
/// Never from user data.
const MEASURED: [FileName; 2] = [FileName::Policy, FileName::SecureComms];
/// Never from user data, and init-data don't bring the last two as files either.
const ONLY_MEASURED: [FileName; 4] =
    [FileName::Policy, FileName::SecureComms, FileName::InitDataToml, FileName::InitDataDigest];

/// Of two files with one name the last counts.
fn last(user_data: &UserData, name: FileName) -> Option<&[u8]> {
    user_data.files.iter().rev().find(|(file, _)| *file == name).map(|(_, content)| content.as_slice())
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: &str = "692f2059ebbdf6189c795392d263f2bd0b4020d43e5044b22965424e1670759a";

    fn user_data(files: &[(FileName, &str)]) -> UserData {
        UserData {
            files: files.iter().map(|(name, text)| (*name, text.as_bytes().to_vec())).collect(),
            skipped: Vec::new(),
        }
    }

    fn init_data(files: &[(FileName, &str)]) -> InitData {
        InitData {
            toml: b"toml".to_vec(),
            digest: DIGEST.to_owned(),
            files: user_data(files).files,
            skipped: Vec::new(),
        }
    }

    fn options(without_init_data: WithoutInitData) -> Options {
        Options { without_init_data, require_tpm: false }
    }

    fn texts(set: &FileSet) -> Vec<(&'static str, String)> {
        set.files()
            .map(|(name, content)| (name.as_str(), String::from_utf8_lossy(content).into_owned()))
            .collect()
    }

    fn pair(name: &'static str, content: &str) -> (&'static str, String) {
        (name, content.to_owned())
    }

    #[test]
    fn config_counts_only_from_init_data() {
        let user_data = user_data(&[
            (FileName::Apf, "{}"),
            (FileName::AttestationAgent, "evil"),
            (FileName::ConfidentialDataHub, "evil"),
            (FileName::Policy, "evil"),
            (FileName::SecureComms, "evil"),
            (FileName::InitDataDigest, "evil"),
            (FileName::InitDataToml, "evil"),
            (FileName::InitData, "raw"),
        ]);
        let init_data = init_data(&[(FileName::AttestationAgent, "a"), (FileName::SecureComms, "s")]);
        for choice in [WithoutInitData::Refuse, WithoutInitData::Dummy, WithoutInitData::UserData] {
            let set =
                plan(&user_data, Some(init_data.clone()), &Earlier::default(), &options(choice)).unwrap();
            assert_eq!(
                texts(&set),
                [
                    pair("apf.json", "{}"),
                    pair("initdata", "raw"),
                    pair("aa.toml", "a"),
                    pair("secure-comms.toml", "s"),
                    pair("initdata.toml", "toml"),
                    pair("initdata.digest", DIGEST),
                ]
            );
            let ignored: Vec<_> = set.notes().iter().map(ToString::to_string).collect();
            assert_eq!(ignored.len(), 6, "{ignored:?}");
            assert!(ignored.iter().all(|note| note.contains("not used") && !note.contains("evil")));
        }
    }

    #[test]
    fn init_data_without_aa_toml_get_an_empty_one() {
        let user_data = user_data(&[(FileName::Apf, "{}"), (FileName::InitData, "raw")]);
        let set =
            plan(&user_data, Some(init_data(&[])), &Earlier::default(), &options(WithoutInitData::Refuse))
                .unwrap();
        assert_eq!(set.get(FileName::AttestationAgent), Some(&b""[..]));
        assert_eq!(set.notes(), [Note::EmptyAgentConfig]);
    }

    #[test]
    fn without_init_data_the_flag_decides() {
        let user_data = user_data(&[
            (FileName::Apf, "{}"),
            (FileName::AttestationAgent, "a"),
            (FileName::Policy, "evil"),
        ]);
        let run = |choice| plan(&user_data, None, &Earlier::default(), &options(choice));
        assert_eq!(run(WithoutInitData::Refuse), Err(PlanError::NoInitData));
        let dummy = run(WithoutInitData::Dummy).unwrap();
        let raw = std::str::from_utf8(DUMMY).unwrap();
        let common = [pair("apf.json", "{}"), pair("initdata", raw)];
        assert_eq!(texts(&dummy)[..2], common);
        assert_eq!(texts(&dummy)[2..], [pair("aa.toml", ""), pair("initdata.digest", DUMMY_DIGEST)]);
        let user = run(WithoutInitData::UserData).unwrap();
        assert_eq!(texts(&user)[..2], common);
        assert_eq!(texts(&user)[2..], [pair("aa.toml", "a"), pair("initdata.digest", DUMMY_DIGEST)]);
        assert_eq!(
            user.notes(),
            [
                Note::OnlyFromInitData(FileName::Policy),
                Note::Unmeasured(FileName::AttestationAgent),
                Note::Dummy
            ]
        );
    }

    #[test]
    fn init_data_in_the_directory_count_if_none_came() {
        let earlier = Earlier { init_data: Some(b"old".to_vec()), digest: None };
        let without = user_data(&[(FileName::Apf, "{}")]);
        assert_eq!(raw_init_data(&without, &earlier), Some(&b"old"[..]));
        let set = plan(&without, Some(init_data(&[])), &earlier, &options(WithoutInitData::Refuse)).unwrap();
        assert_eq!(set.get(FileName::InitData), Some(&b"old"[..]));
        assert_eq!(set.notes()[0], Note::InitDataFromDirectory);
        let with =
            user_data(&[(FileName::Apf, "{}"), (FileName::InitData, "x"), (FileName::InitData, "new")]);
        assert_eq!(raw_init_data(&with, &earlier), Some(&b"new"[..]));
    }

    #[test]
    fn the_dummy_of_an_earlier_run_is_no_init_data() {
        let earlier =
            Earlier { init_data: Some(DUMMY.to_vec()), digest: Some(DUMMY_DIGEST.as_bytes().to_vec()) };
        let user_data = user_data(&[(FileName::Apf, "{}"), (FileName::AttestationAgent, "a")]);
        assert_eq!(raw_init_data(&user_data, &earlier), None);
        let run = |choice| plan(&user_data, None, &earlier, &options(choice));
        assert_eq!(run(WithoutInitData::Refuse), Err(PlanError::NoInitData));
        assert_eq!(run(WithoutInitData::UserData).unwrap().get(FileName::AttestationAgent), Some(&b"a"[..]));
    }

    #[test]
    fn other_init_data_in_one_boot_are_refused() {
        let user_data = user_data(&[(FileName::Apf, "{}"), (FileName::InitData, "raw")]);
        let run = |digest: &str| {
            let earlier = Earlier { init_data: None, digest: Some(digest.as_bytes().to_vec()) };
            plan(&user_data, Some(init_data(&[])), &earlier, &Options::default()).map(|_| ())
        };
        assert_eq!(run(DIGEST), Ok(()));
        assert_eq!(run(DUMMY_DIGEST), Err(PlanError::OtherInitData));
        assert_eq!(run(""), Err(PlanError::OtherInitData));
        assert!(PlanError::OtherInitData.is_permanent());
    }

    #[test]
    fn user_data_without_a_complete_apf_json_are_refused() {
        let run = |files| check(&user_data(files));
        assert_eq!(run(&[]), Err(PlanError::NoApf));
        assert_eq!(run(&[(FileName::Apf, "{\"a\": ")]), Err(PlanError::NotJson(FileName::Apf)));
        assert_eq!(
            run(&[(FileName::Apf, "{}"), (FileName::Auth, "{\"auths\"")]),
            Err(PlanError::NotJson(FileName::Auth))
        );
        assert_eq!(run(&[(FileName::Apf, "cut"), (FileName::Apf, "{}")]), Ok(()));
        assert!(!PlanError::NoApf.is_permanent() && !PlanError::NotJson(FileName::Apf).is_permanent());
    }

    #[test]
    fn a_digest_of_another_form_is_refused() {
        for digest in ["", "abc", &DIGEST.to_uppercase(), &"g".repeat(64), &"a".repeat(65)] {
            let user_data = user_data(&[(FileName::Apf, "{}"), (FileName::InitData, "raw")]);
            let init_data = InitData { digest: digest.to_owned(), ..init_data(&[]) };
            let result = plan(&user_data, Some(init_data), &Earlier::default(), &Options::default());
            assert_eq!(result, Err(PlanError::Digest), "{digest}");
        }
    }

    #[test]
    fn debug_output_shows_no_content() {
        let user_data = user_data(&[(FileName::Apf, "{\"secret\":1}")]);
        let set = plan(&user_data, None, &Earlier::default(), &options(WithoutInitData::Dummy)).unwrap();
        assert!(!format!("{set:?}").contains("secret"));
        let earlier = Earlier { init_data: Some(b"secret".to_vec()), digest: Some(b"secret".to_vec()) };
        assert!(!format!("{earlier:?}").contains("secret"));
    }
}
