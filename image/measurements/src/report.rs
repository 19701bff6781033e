//! Predicted values, in the forms that people, scripts and Trustee read.

use std::collections::BTreeMap;

use base64ct::{Base64, Encoding};
use serde_json::{Value, json};

use crate::event::Event;
use crate::register::{hex, pcr, rtmr2};

/// Form of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A line `PCR DIGEST` for each register of the SHA-256 bank, in their order.
    Text,
    /// An object with the registers and the events.
    Json,
    /// A message for Trustee's reference value provider (RVPS), as `rvps-tool register --path` takes it.
    Rvps,
    /// What [`Format::Rvps`] carries: reference values by their names.
    ReferenceValues,
}

impl std::str::FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            "rvps" => Ok(Self::Rvps),
            "reference-values" => Ok(Self::ReferenceValues),
            _ => Err(format!("no format {text}: text, json, rvps or reference-values")),
        }
    }
}

/// What is predicted of one boot.
#[derive(Clone, Debug, Default)]
pub struct Prediction {
    /// Registers of a TPM that are predicted, also those that nothing extends.
    pub registers: Vec<u8>,
    /// The events, in their order.
    pub events: Vec<Event>,
    /// Launch digest with SEV-SNP, in hex.
    pub snp_launch: Option<String>,
}

impl Prediction {
    /// The prediction in a form, with a line break at its end.
    pub fn print(&self, format: Format) -> String {
        match format {
            Format::Text => self.text(),
            Format::Json => format!("{:#}\n", self.json()),
            Format::Rvps => {
                let payload = Base64::encode_string(self.reference_values().to_string().as_bytes());
                format!("{:#}\n", json!({ "version": "0.1.0", "type": "sample", "payload": payload }))
            }
            Format::ReferenceValues => format!("{:#}\n", self.reference_values()),
        }
    }

    /// Digests of the registers, by number.
    fn values(&self) -> BTreeMap<u8, String> {
        self.registers.iter().map(|register| (*register, hex(&pcr(*register, &self.events)))).collect()
    }

    fn text(&self) -> String {
        let mut text: String =
            self.values().iter().map(|(register, digest)| format!("{register} {digest}\n")).collect();
        if let Some(launch) = &self.snp_launch {
            text.push_str(&format!("snp {launch}\n"));
        }
        text
    }

    fn json(&self) -> Value {
        let registers: BTreeMap<String, String> =
            self.values().into_iter().map(|(register, digest)| (register.to_string(), digest)).collect();
        let events: Vec<_> = self
            .events
            .iter()
            .filter(|event| self.registers.contains(&event.pcr))
            .map(
                |event| json!({ "pcr": event.pcr, "what": event.what, "sha256": hex(&event.digests.sha256) }),
            )
            .collect();
        let mut object = json!({ "pcrs": registers, "events": events, "rtmr_2": hex(&rtmr2(&self.events)) });
        if let (Some(launch), Some(object)) = (&self.snp_launch, object.as_object_mut()) {
            object.insert("snp_launch_measurement".to_owned(), json!(launch));
        }
        object
    }

    /// Names as Trustee's default policy has them (`snp_pcr11`, `tdx_pcr11`, `tpm_pcr11`, `rtmr_2`,
    /// `snp_launch_measurement`), each with a list of accepted values.
    fn reference_values(&self) -> Value {
        let mut values = serde_json::Map::new();
        for (register, digest) in self.values() {
            for platform in ["snp", "tdx", "tpm"] {
                values.insert(format!("{platform}_pcr{register:02}"), json!([digest]));
            }
        }
        values.insert("rtmr_2".to_owned(), json!([hex(&rtmr2(&self.events))]));
        if let Some(launch) = &self.snp_launch {
            values.insert("snp_launch_measurement".to_owned(), json!([launch]));
        }
        Value::Object(values)
    }
}

#[cfg(test)]
mod tests {
    use base64ct::{Base64, Encoding};
    use serde_json::{Value, json};

    use super::{Format, Prediction};
    use crate::event::Event;

    const SEPARATED: &str = "3d458cfe55cc03ea1f443f1562beec8df51c75e14a9fcf9a7234a13f198e7969";
    const ZEROS: &str = "0000000000000000000000000000000000000000000000000000000000000000";

    fn prediction() -> Prediction {
        Prediction {
            registers: vec![12, 4],
            events: vec![Event::separator(4), Event::separator(7)],
            snp_launch: Some("ab".repeat(48)),
        }
    }

    #[test]
    fn text_is_a_line_for_each_register() {
        let launch = "ab".repeat(48);
        assert_eq!(prediction().print(Format::Text), format!("4 {SEPARATED}\n12 {ZEROS}\nsnp {launch}\n"));
    }

    #[test]
    fn json_has_registers_and_their_events() {
        let value: Value = serde_json::from_str(&prediction().print(Format::Json)).unwrap();
        assert_eq!(value["pcrs"], json!({ "4": SEPARATED, "12": ZEROS }));
        assert_eq!(value["events"].as_array().unwrap().len(), 1);
        assert_eq!(value["events"][0]["what"], "separator");
    }

    /// The message that Trustee's rvps/README.md makes by hand for the "sample" extractor: names with lists of values.
    #[test]
    fn rvps_gets_a_message_with_lists_of_values() {
        let message: Value = serde_json::from_str(&prediction().print(Format::Rvps)).unwrap();
        assert_eq!(message["version"], "0.1.0");
        assert_eq!(message["type"], "sample");
        assert_eq!(message.as_object().unwrap().len(), 3);
        let payload = Base64::decode_vec(message["payload"].as_str().unwrap()).unwrap();
        let values: Value = serde_json::from_slice(&payload).unwrap();
        for platform in ["snp", "tdx", "tpm"] {
            assert_eq!(values[format!("{platform}_pcr04")], json!([SEPARATED]));
            assert_eq!(values[format!("{platform}_pcr12")], json!([ZEROS]));
        }
        assert_eq!(values["snp_launch_measurement"], json!(["ab".repeat(48)]));
        assert_eq!(values["rtmr_2"][0].as_str().unwrap().len(), 96);
        let printed: Value = serde_json::from_str(&prediction().print(Format::ReferenceValues)).unwrap();
        assert_eq!(printed, values);
    }
}
