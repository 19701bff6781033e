//! Which cloud the machine is in, by a file that is there and by what its firmware says (SMBIOS). Nothing is probed over the network.

use std::fmt;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use crate::input;

/// Where user data come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cloud {
    /// A file: the NoCloud disk, mounted.
    NoCloud,
    /// Microsoft Azure.
    Azure,
    /// Amazon EC2.
    Aws,
    /// Google Compute Engine.
    Gcp,
    /// Alibaba Cloud.
    Alibaba,
    /// OpenStack, and the clouds built on it.
    OpenStack,
}

impl fmt::Display for Cloud {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoCloud => "NoCloud",
            Self::Azure => "Azure",
            Self::Aws => "AWS",
            Self::Gcp => "GCP",
            Self::Alibaba => "Alibaba Cloud",
            Self::OpenStack => "OpenStack",
        })
    }
}

/// Where the facts are; other paths only in tests.
#[derive(Clone, Debug)]
pub struct Places {
    /// The user data of NoCloud.
    pub no_cloud: PathBuf,
    /// The kernel's view of SMBIOS.
    pub dmi: PathBuf,
}

impl Default for Places {
    fn default() -> Self {
        Self { no_cloud: "/media/cidata/user-data".into(), dmi: "/sys/class/dmi/id".into() }
    }
}

/// A fact that is there and can't be read: which cloud it is remains unknown.
#[derive(Debug, thiserror::Error)]
#[error("reading {}, which says what cloud this is", .path.display())]
pub struct DetectError {
    path: PathBuf,
    #[source]
    cause: io::Error,
}

/// The chassis asset tag of every VM in Azure, on amd64 and arm64 alike; a Hyper-V machine elsewhere has another.
const AZURE_TAG: &str = "7783-7084-3265-9085-8269-3286-77";
/// Product names of OpenStack's own, and asset tags of clouds built on it, as cloud-init's OpenStack data source knows them.
const OPENSTACK: [&str; 2] = ["OpenStack Nova", "OpenStack Compute"];
const OPENSTACK_TAGS: [&str; 6] = [
    "OpenStack Nova",
    "OpenStack Compute",
    "OpenTelekomCloud",
    "HUAWEICLOUD",
    "SAP CCloud VM",
    "Samsung Cloud Platform",
];

/// The cloud; `None` on a machine that is none of them. A file comes first; anything but "not found" at its path selects it, so that
/// a broken disk is a fault and not another cloud.
///
/// # Errors
/// If a fact is there and can't be read.
pub fn detect(places: &Places) -> Result<Option<Cloud>, DetectError> {
    match fs::symlink_metadata(&places.no_cloud) {
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        _ => return Ok(Some(Cloud::NoCloud)),
    }
    let fact = |name: &str| fact(&places.dmi.join(name));
    let (vendor, product, tag) = (fact("sys_vendor")?, fact("product_name")?, fact("chassis_asset_tag")?);
    Ok(by_smbios(&vendor, &product, &tag))
}

fn by_smbios(vendor: &str, product: &str, tag: &str) -> Option<Cloud> {
    if tag == AZURE_TAG {
        Some(Cloud::Azure)
    } else if vendor == "Amazon EC2" {
        Some(Cloud::Aws)
    } else if vendor == "Google" || product == "Google" || product == "Google Compute Engine" {
        Some(Cloud::Gcp)
    } else if vendor == "Alibaba Cloud" || product == "Alibaba Cloud ECS" {
        Some(Cloud::Alibaba)
    } else if vendor == "OpenStack Foundation"
        || OPENSTACK.contains(&product)
        || OPENSTACK_TAGS.contains(&tag)
    {
        Some(Cloud::OpenStack)
    } else {
        None
    }
}

/// A string of SMBIOS, without the newline that the kernel adds; empty if there is none. Spaces count.
fn fact(path: &Path) -> Result<String, DetectError> {
    let text = match input::read(path, 1024) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(String::new()),
        Err(cause) => return Err(DetectError { path: path.to_owned(), cause }),
    };
    let text = text.strip_suffix(b"\n").unwrap_or(&text);
    Ok(String::from_utf8_lossy(text).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(facts: &[(&str, &str)]) -> (tempfile::TempDir, Places) {
        let root = tempfile::tempdir().unwrap();
        let dmi = root.path().join("dmi");
        fs::create_dir(&dmi).unwrap();
        for (name, text) in facts {
            fs::write(dmi.join(name), format!("{text}\n")).unwrap();
        }
        let places = Places { no_cloud: root.path().join("cidata/user-data"), dmi };
        (root, places)
    }

    fn found(facts: &[(&str, &str)]) -> Option<Cloud> {
        detect(&machine(facts).1).unwrap()
    }

    #[test]
    fn each_cloud_is_known_by_its_firmware() {
        for (name, text, cloud) in [
            ("chassis_asset_tag", AZURE_TAG, Cloud::Azure),
            ("sys_vendor", "Amazon EC2", Cloud::Aws),
            ("sys_vendor", "Google", Cloud::Gcp),
            ("product_name", "Google", Cloud::Gcp),
            ("product_name", "Google Compute Engine", Cloud::Gcp),
            ("sys_vendor", "Alibaba Cloud", Cloud::Alibaba),
            ("product_name", "Alibaba Cloud ECS", Cloud::Alibaba),
            ("sys_vendor", "OpenStack Foundation", Cloud::OpenStack),
            ("product_name", "OpenStack Nova", Cloud::OpenStack),
            ("product_name", "OpenStack Compute", Cloud::OpenStack),
            ("chassis_asset_tag", "OpenTelekomCloud", Cloud::OpenStack),
        ] {
            assert_eq!(found(&[(name, text)]), Some(cloud), "{name} {text}");
        }
    }

    #[test]
    fn a_string_counts_only_as_a_whole() {
        for text in [
            "Amazon EC2 ",
            " Amazon EC2",
            "amazon ec2",
            "Amazon EC2\n",
            "Xen",
            "",
            "Microsoft Corporation",
            "QEMU",
        ] {
            assert_eq!(found(&[("sys_vendor", text)]), None, "{text:?}");
        }
        assert_eq!(found(&[("product_name", "Amazon EC2")]), None);
        assert_eq!(found(&[]), None);
    }

    #[test]
    fn a_file_comes_before_every_cloud() {
        let (root, places) = machine(&[("sys_vendor", "Amazon EC2")]);
        fs::create_dir(root.path().join("cidata")).unwrap();
        assert_eq!(detect(&places).unwrap(), Some(Cloud::Aws));
        fs::write(&places.no_cloud, "").unwrap();
        assert_eq!(detect(&places).unwrap(), Some(Cloud::NoCloud));
    }

    #[test]
    fn what_is_there_but_no_file_selects_the_file() {
        let (root, places) = machine(&[("sys_vendor", "Amazon EC2")]);
        fs::write(root.path().join("cidata"), "a file instead of the directory").unwrap();
        assert_eq!(detect(&places).unwrap(), Some(Cloud::NoCloud));
    }

    #[test]
    fn a_fact_that_cannot_be_read_is_an_error() {
        let (_root, places) = machine(&[]);
        fs::create_dir(places.dmi.join("sys_vendor")).unwrap();
        assert!(detect(&places).unwrap_err().to_string().contains("dmi/sys_vendor"));
    }
}
