"""The formats of well-known keys, for `redact`. Each one says where its vendor documents it.

The patterns are of the syntax of RE2. A pattern's group `secret` is what is replaced; without the group, all of it is.
To add a format: choose a pattern with a fixed beginning or context, since it is looked for in every text, and give an
example in the tests. Names are settings, so they stay.
"""

from __future__ import annotations

from typing import NamedTuple


class KeyFormat(NamedTuple):
    """One format.

    Attributes:
        name: Its name in settings, in accounts and in redacted events.
        pattern: How to find it.
        source: Where its vendor, or a standard, documents it.
    """

    name: str
    pattern: str
    source: str


# What stands between a name and its value: in a URL or a file of settings, in JSON, in the `repr` of a dictionary.
_IS = r"""\\?["']?\s{0,3}(?:=>|[:=])\s{0,3}\\?["']?"""

# As it is, and as pandas and others write it in JSON.
_SLASH = r"\\?/"

FORMATS: tuple[KeyFormat, ...] = (
    KeyFormat(
        "aws_key",
        r"\b(?:AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16}\b",
        "https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_identifiers.html",
    ),
    KeyFormat(
        "aws_secret_key",
        rf"(?i:aws_?secret_?access_?key|aws_?secret_?key|secret_?access_?key){_IS}(?P<secret>(?:[A-Za-z0-9+]|{_SLASH}){{40}})",
        "https://docs.aws.amazon.com/IAM/latest/UserGuide/id_credentials_access-keys.html",
    ),
    KeyFormat(
        "aws_session_token",
        rf"(?i:aws_?session_?token|session_?token){_IS}(?P<secret>(?:[A-Za-z0-9+]|{_SLASH}){{80,}}={{0,2}})",
        "https://docs.aws.amazon.com/IAM/latest/UserGuide/id_credentials_temp_use-resources.html",
    ),
    KeyFormat(
        "gcp_api_key",
        r"\bAIza[0-9A-Za-z_-]{35}",
        "https://cloud.google.com/docs/authentication/api-keys",
    ),
    KeyFormat(
        "gcp_access_token",
        r"\bya29\.[0-9A-Za-z_.-]{20,}",
        "https://cloud.google.com/docs/authentication/token-types",
    ),
    KeyFormat(
        "gcp_client_secret",
        r"\bGOCSPX-[0-9A-Za-z_-]{20,}",
        "https://developers.google.com/identity/protocols/oauth2",
    ),
    KeyFormat(
        "azure_account_key",
        rf"(?i:accountkey|sharedaccesskey)=(?P<secret>(?:[A-Za-z0-9+]|{_SLASH}){{40,}}={{0,2}})",
        "https://learn.microsoft.com/azure/storage/common/storage-configure-connection-string",
    ),
    KeyFormat(
        "azure_client_secret",
        r"[A-Za-z0-9_~.-]{3}[0-9]Q~[A-Za-z0-9_~.-]{31,34}",
        "https://learn.microsoft.com/purview/sit-defn-azure-ad-client-secret",
    ),
    KeyFormat(
        "github_token",
        r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{22,})",
        "https://docs.github.com/authentication/keeping-your-account-and-data-secure/about-authentication-to-github",
    ),
    KeyFormat(
        "gitlab_token",
        r"\bgl(?:pat|oas|dt|rt|cbt|ptt|ft|imt|agent|wt|soat|ffct)-[A-Za-z0-9_.-]{20,}",
        "https://docs.gitlab.com/security/tokens/#token-prefixes",
    ),
    KeyFormat(
        "slack_token",
        r"\b(?:xox[abceoprs](?:\.xox[bp])?-[A-Za-z0-9-]{10,}|xapp-[0-9]-[A-Za-z0-9-]{10,})",
        "https://docs.slack.dev/authentication/tokens",
    ),
    KeyFormat(
        "slack_webhook",
        rf"\bhooks\.slack(?:-gov)?\.com{_SLASH}(?:services|workflows|triggers){_SLASH}"
        rf"(?P<secret>(?:[A-Za-z0-9_-]|{_SLASH}){{20,}})",
        "https://docs.slack.dev/messaging/sending-messages-using-incoming-webhooks",
    ),
    KeyFormat(
        "jwt",
        r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*(?:\.[A-Za-z0-9_-]+){0,2}",
        "https://www.rfc-editor.org/rfc/rfc7519",
    ),
    KeyFormat(
        "private_key",
        # To the end of the text where the block has no end: better too much than the rest of a key.
        r"-----BEGIN (?:[A-Z0-9]+ ){0,4}PRIVATE KEY(?: BLOCK)?-----(?s:.*?)"
        r"(?:-----END (?:[A-Z0-9]+ ){0,4}PRIVATE KEY(?: BLOCK)?-----|\z)"
        # The same in base64, as in a Kubernetes secret: "-----BEGIN PRIVATE KEY", and RSA, EC, DSA, OPENSSH, ENCRYPTED.
        r"|LS0tLS1CRUdJTi(?:BQUklWQVRF|BSU0EgUFJJVkFUR|BFQyBQUklWQVRF|BEU0EgUFJJVkFUR|BPUEVOU1NIIFBSSVZBVE|"
        r"BFTkNSWVBURUQgUFJJVkFUR)[A-Za-z0-9+/]{20,}={0,2}",
        "https://www.rfc-editor.org/rfc/rfc7468",
    ),
    KeyFormat(
        "age_key",
        r"\bAGE-SECRET-KEY-1[0-9A-Z]{58}\b",
        "https://github.com/C2SP/C2SP/blob/main/age.md",
    ),
    KeyFormat(
        "url_password",
        rf"""\b[A-Za-z][A-Za-z0-9+.-]{{1,30}}:{_SLASH}{_SLASH}[^\s/?#@:"'<>]{{0,200}}:(?P<secret>[^\s/?#"'<>]{{1,500}})@""",
        "https://www.rfc-editor.org/rfc/rfc3986#section-3.2.1",
    ),
    KeyFormat(
        "url_token",
        r"[?&;](?i:access_?token|refresh_?token|id_token|auth_?token|token|api_?key|client_secret|password|sig|signature|"
        r"x-amz-signature|x-amz-security-token|x-goog-signature)=(?P<secret>[^&;\s\"'<>#]{8,})",
        "https://www.rfc-editor.org/rfc/rfc6750#section-2.3",
    ),
    KeyFormat(
        "authorization_header",
        rf"(?i:authorization){_IS}(?i:bearer|basic|token|apikey|bot|negotiate)\s{{1,3}}(?P<secret>[\w.~+/=:-]{{6,}})"
        r"|\b[Bb]earer\s{1,3}[A-Za-z0-9_.~+/-]{20,}={0,2}",
        "https://www.rfc-editor.org/rfc/rfc9110#section-11.6.2",
    ),
    KeyFormat(
        "api_key_header",
        rf"(?i:x-api-key|x-auth-token|dd-api-key|dd-application-key|private-token|x-vault-token){_IS}"
        r"(?P<secret>[\w.~+/=-]{8,})",
        "https://docs.datadoghq.com/api/latest/authentication/",
    ),
    KeyFormat(
        "environment_variable",
        rf"\b(?:[A-Z0-9]+_)*(?:API_?KEY|ACCESS_KEY|SECRET_KEY|PRIVATE_KEY|SECRET|TOKEN|PASSWORD|PASSWD|PASSPHRASE){_IS}"
        r"(?P<secret>[A-Za-z0-9+/_.~!@$%^&*-]{8,}={0,2})",
        "https://pubs.opengroup.org/onlinepubs/9799919799/basedefs/V1_chap08.html",
    ),
    KeyFormat(
        "zenml_key",
        r"\bZEN(?:PRO)?KEY_[A-Za-z0-9_+/=-]{20,}",
        "https://docs.zenml.io/how-to/manage-zenml-server/connecting-to-zenml",
    ),
    KeyFormat(
        "openai_key",
        r"\bsk-(?:(?:proj|svcacct|admin|None)-[A-Za-z0-9_-]{20,}|[A-Za-z0-9]{20,})",
        "https://platform.openai.com/docs/api-reference/authentication",
    ),
    KeyFormat(
        "anthropic_key",
        r"\bsk-ant-[A-Za-z0-9_-]{20,}",
        "https://docs.anthropic.com/en/api/getting-started",
    ),
    KeyFormat(
        "huggingface_token",
        r"\b(?:hf|api_org)_[A-Za-z0-9]{30,}",
        "https://huggingface.co/docs/hub/security-tokens",
    ),
    KeyFormat(
        "databricks_token",
        r"\bdapi[0-9a-f]{32}(?:-[0-9])?\b",
        "https://docs.databricks.com/aws/en/dev-tools/auth/pat",
    ),
    KeyFormat(
        "stripe_key",
        r"\b(?:(?:sk|rk)_(?:live|test)_[A-Za-z0-9]{10,}|whsec_[A-Za-z0-9+/]{20,})",
        "https://docs.stripe.com/keys",
    ),
    KeyFormat(
        "npm_token",
        r"\bnpm_[A-Za-z0-9]{36}\b",
        "https://docs.npmjs.com/about-access-tokens",
    ),
    KeyFormat(
        "pypi_token",
        r"\bpypi-[A-Za-z0-9_-]{50,}",
        "https://docs.pypi.org/api/secrets/",
    ),
    KeyFormat(
        "docker_token",
        r"\bdckr_[op]at_[A-Za-z0-9_-]{20,}",
        "https://docs.docker.com/security/for-developers/access-tokens/",
    ),
    KeyFormat(
        "grafana_token",
        r"\b(?:glsa_[A-Za-z0-9]{32}_[A-Fa-f0-9]{8}|glc_[A-Za-z0-9+/]{32,}={0,2})",
        "https://grafana.com/docs/grafana/latest/administration/service-accounts/",
    ),
    KeyFormat(
        "vault_token",
        r"\bhv[sbr]\.[A-Za-z0-9_-]{20,}",
        "https://developer.hashicorp.com/vault/docs/concepts/tokens",
    ),
    KeyFormat(
        "terraform_token",
        r"\b[A-Za-z0-9]{14}\.atlasv1\.[A-Za-z0-9_-]{60,}",
        "https://developer.hashicorp.com/terraform/cloud-docs/users-teams-organizations/api-tokens",
    ),
    KeyFormat(
        "sendgrid_key",
        r"\bSG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}",
        "https://www.twilio.com/docs/sendgrid/ui/account-and-settings/api-keys",
    ),
    KeyFormat(
        "mailchimp_key",
        r"\b[0-9a-f]{32}-us[0-9]{1,2}\b",
        "https://mailchimp.com/developer/marketing/docs/fundamentals/",
    ),
    KeyFormat(
        "telegram_token",
        r"\b[0-9]{8,10}:[A-Za-z0-9_-]{35}\b",
        "https://core.telegram.org/bots/api#authorizing-your-bot",
    ),
    KeyFormat(
        "digitalocean_token",
        r"\bdo[opr]_v1_[0-9a-f]{64}\b",
        "https://docs.digitalocean.com/reference/api/create-personal-access-token/",
    ),
    KeyFormat(
        "atlassian_token",
        r"\bAT(?:ATT|CTT|BB)[A-Za-z0-9_=-]{24,}",
        "https://support.atlassian.com/atlassian-account/docs/manage-api-tokens-for-your-atlassian-account/",
    ),
    KeyFormat(
        "linear_key",
        r"\blin_(?:api|oauth)_[A-Za-z0-9]{32,}",
        "https://linear.app/developers/graphql",
    ),
    KeyFormat(
        "notion_token",
        r"\bntn_[A-Za-z0-9]{40,}",
        "https://developers.notion.com/docs/authorization",
    ),
    KeyFormat(
        "shopify_token",
        r"\bshp(?:at|ca|pa|ss)_[A-Fa-f0-9]{32}\b",
        "https://shopify.dev/docs/apps/build/authentication-authorization",
    ),
    KeyFormat(
        "newrelic_key",
        r"\bNRAK-[A-Z0-9]{27}\b",
        "https://docs.newrelic.com/docs/apis/intro-apis/new-relic-api-keys/",
    ),
    KeyFormat(
        "sentry_token",
        r"\bsntry[su]_[A-Za-z0-9+/=_-]{40,}",
        "https://docs.sentry.io/api/auth/",
    ),
    KeyFormat(
        "postman_key",
        r"\bPMAK-[0-9a-f]{24}-[0-9a-f]{34}\b",
        "https://learning.postman.com/docs/developer/postman-api/authentication/",
    ),
    KeyFormat(
        "planetscale_token",
        r"\bpscale_(?:tkn|pw|oauth)_[A-Za-z0-9_.=-]{32,}",
        "https://planetscale.com/docs/concepts/service-tokens",
    ),
)
"""All formats. The list grows with releases."""
