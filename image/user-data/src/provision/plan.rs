//! Which files a VM gets from its user data and its init-data.
//!
//! What is measured decides. Init-data are bound to the evidence by their digest, user data are not: so the configuration of the
//! guest components, the policy and the settings of Secure Comms come from init-data alone.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;

use super::{Options, WithoutInitData};
use crate::files::{FileName, InitData, Skipped, UserData};
use crate::init_data::{self, DUMMY, InitDataError};

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
    /// What was left out of the user data.
    UserData(Skipped),
    /// What was left out of the init-data.
    InitData(Skipped),
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
            Self::UserData(skipped) => write!(f, "user data: {skipped}"),
            Self::InitData(skipped) => write!(f, "init-data: {skipped}"),
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
    /// No init-data, and the image wants them.
    #[error(
        "user data: no init-data; give the pod init-data, or start an image with --without-init-data dummy for pods without"
    )]
    NoInitData,
    /// The init-data of the user data can't be used.
    #[error("user data: {0}")]
    InitData(InitDataError),
    /// The init-data in the directory can't be used.
    #[error("file initdata, and none in the user data: {0}")]
    EarlierInitData(InitDataError),
    /// Other init-data were written in this boot.
    #[error("init-data: not those of an earlier run in this boot, which the evidence covers; restart the VM")]
    OtherInitData,
}

impl PlanError {
    /// Whether more than a few tries can't help: a text that was cut may be whole the next time, this one is whole.
    pub fn is_permanent(&self) -> bool {
        match self {
            Self::NoApf => false,
            Self::InitData(error) => error.is_permanent(),
            Self::NoInitData | Self::EarlierInitData(_) | Self::OtherInitData => true,
        }
    }
}

/// Decides over each file, from user data that [`crate::cloud_config::parse`] has accepted.
///
/// Init-data of the user data count before those in the directory. [`DUMMY`] in the directory is what an earlier run made, so it is
/// as if none were there.
///
/// # Errors
/// The first fault; then nothing may be written.
pub fn plan(user_data: &UserData, earlier: &Earlier, options: &Options) -> Result<FileSet, PlanError> {
    let mut set = FileSet { files: BTreeMap::new(), digest: String::new(), notes: Vec::new() };
    set.notes.extend(user_data.skipped.iter().copied().map(Note::UserData));
    set.take_unmeasured(user_data)?;
    let in_directory = earlier.init_data.as_deref().filter(|raw| *raw != DUMMY.as_bytes());
    if let Some(raw) = content(user_data, FileName::InitData) {
        let init_data = init_data::decode(raw).map_err(PlanError::InitData)?;
        set.ignore_config(user_data);
        set.take_init_data(init_data, raw);
    } else if let Some(raw) = in_directory {
        let init_data = init_data::decode(raw).map_err(PlanError::EarlierInitData)?;
        set.notes.push(Note::InitDataFromDirectory);
        set.ignore_config(user_data);
        set.take_init_data(init_data, raw);
    } else {
        match options.without_init_data {
            WithoutInitData::Refuse => return Err(PlanError::NoInitData),
            WithoutInitData::Dummy => set.ignore_config(user_data),
            WithoutInitData::UserData => set.take_config(user_data),
        }
        set.take_dummy();
    }
    if earlier.digest.as_ref().is_some_and(|earlier| earlier != set.digest.as_bytes()) {
        return Err(PlanError::OtherInitData);
    }
    set.files.insert(FileName::InitDataDigest, set.digest.clone().into_bytes());
    Ok(set)
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

    /// Adds a file of the image, unless the set has one of this name.
    pub fn add_default(&mut self, name: FileName, content: Vec<u8>) {
        self.files.entry(name).or_insert(content);
    }

    /// The content of a file, if it is in the set.
    pub(super) fn get(&self, name: FileName) -> Option<&[u8]> {
        self.files.get(&name).map(Vec::as_slice)
    }

    /// Files that decide nothing over trust: what the agent believes of apf.json is its own question.
    fn take_unmeasured(&mut self, user_data: &UserData) -> Result<(), PlanError> {
        for name in [FileName::Apf, FileName::Auth, FileName::ScratchSpaceMarker] {
            if let Some(content) = content(user_data, name) {
                self.files.insert(name, content.to_vec());
            }
        }
        if self.files.contains_key(&FileName::Apf) { Ok(()) } else { Err(PlanError::NoApf) }
    }

    fn ignore_config(&mut self, user_data: &UserData) {
        let there = CONFIG.into_iter().filter(|name| content(user_data, *name).is_some());
        self.notes.extend(there.map(Note::OnlyFromInitData));
    }

    fn take_config(&mut self, user_data: &UserData) {
        for name in CONFIG {
            if let Some(content) = content(user_data, name) {
                self.files.insert(name, content.to_vec());
                self.notes.push(Note::Unmeasured(name));
            }
        }
    }

    fn take_init_data(&mut self, init_data: InitData, raw: &[u8]) {
        self.files.insert(FileName::InitData, raw.to_vec());
        self.files.insert(FileName::InitDataToml, init_data.toml);
        self.digest = init_data.digest;
        self.notes.extend(init_data.skipped.into_iter().map(Note::InitData));
        self.files.extend(init_data.files.into_iter().filter(|(name, _)| FileName::INIT_DATA.contains(name)));
        // Upstream's units wait for this file and say nothing while it is missing. That the init-data have none is measured too, so
        // its absence decides the same as an empty file: the agent's defaults.
        if let Entry::Vacant(agent_config) = self.files.entry(FileName::AttestationAgent) {
            agent_config.insert(Vec::new());
            self.notes.push(Note::EmptyAgentConfig);
        }
    }

    /// No `initdata.toml`: the attestation agent claims no init-data that the VM never got, as upstream's does not.
    fn take_dummy(&mut self) {
        self.files.insert(FileName::InitData, DUMMY.into());
        self.digest = init_data::dummy().digest;
        self.files.entry(FileName::AttestationAgent).or_default();
        self.notes.push(Note::Dummy);
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
        let mut earlier = f.debug_struct("Earlier");
        earlier.field("init_data", &size(&self.init_data)).field("digest", &size(&self.digest)).finish()
    }
}

/// Configuration of the guest components: from user data only by a measured flag.
const CONFIG: [FileName; 2] = [FileName::AttestationAgent, FileName::ConfidentialDataHub];
/// Of two files with one name the last counts.
fn content(user_data: &UserData, name: FileName) -> Option<&[u8]> {
    user_data.files.iter().rev().find(|(file, _)| *file == name).map(|(_, content)| content.as_slice())
}

#[cfg(test)]
mod tests;
